"""The write protocol: order on the disk, failures on any rank, saving in the background."""

import errno
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from records import exact_steps
from safetensors.torch import load_file

from neobert.config.schema import Config
from neobert.train.checkpoint import commit
from neobert.train.checkpoint.commit import Committer, SaveResult, describe_failure
from neobert.train.checkpoint.resume import resume_or_start
from neobert.train.checkpoint.save import complete_save, save_checkpoint
from neobert.train.finish import finish
from neobert.train.loop import pretrain, training_steps
from neobert.train.pretraining import announce
from neobert.train.run import build_run
from neobert.weights.folder import MANIFEST, check_contents, valid_steps

Tiny = Callable[..., Config]


def write(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


def save(runtime: Any, out: Path, step: int, files: dict[str, Any], *, background: bool = False) -> SaveResult:
    committer = Committer(runtime, out)
    committer.begin(step, files, background=background)
    outcome = committer.poll(wait=True)
    assert outcome is not None
    return outcome


def names_in(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_everything_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[tuple[str, str]] = []
    real_fsync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(
        commit.os,
        "fsync",
        lambda fd: (happened.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))), real_fsync(fd))[1],
    )
    monkeypatch.setattr(commit.os, "rename", lambda a, b: (happened.append(("rename", str(b))), real_rename(a, b))[1])

    def write_folder(path: Path) -> None:
        path.mkdir()
        (path / "tokenizer.json").write_text("{}")

    def work(runtime: Any) -> SaveResult:
        files: dict[str, Any] = {f"random_states_{runtime.rank}.pkl": write("r")}
        if runtime.is_main:
            files |= {"model.safetensors": write("weights"), "tokenizer": write_folder}
        return save(runtime, tmp_path, 8, files)

    outcomes = run_ranks(2, work)
    assert outcomes[0] == outcomes[1], "all ranks know how it ended"
    final = tmp_path / "checkpoints" / "8"
    assert outcomes[0].path == final
    renamed = happened.index(("rename", str(final)))
    before = [path.split("/.tmp-8-")[-1].partition("/")[2] for _, path in happened[:renamed] if ".tmp-8-" in path]
    files = ["random_states_0.pkl", "random_states_1.pkl", "model.safetensors", "tokenizer/tokenizer.json"]
    assert set(before) == {*files, MANIFEST, "", "tokenizer"}, "every file and every folder, and the folder itself"
    assert before.index(MANIFEST) > max(before.index(name) for name in files), "the manifest is written last"
    assert before.index("") > before.index(MANIFEST)
    assert happened[renamed + 1] == ("fsync", str(final.parent))
    manifest = check_contents(final)
    assert (manifest.world_size, set(manifest.files)) == (2, set(files))
    assert {oct(p.stat().st_mode & 0o777) for p in final.rglob("*") if p.is_file()} == {"0o644"}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("broken_rank", [0, 1])
def test_a_rank_that_fails_fails_the_save_on_all(tmp_path: Path, broken_rank: int, background: bool) -> None:
    run_ranks(2, lambda runtime: save(runtime, tmp_path, 4, {f"r{runtime.rank}": write("x")}))

    def work(runtime: Any) -> tuple[SaveResult, SaveResult]:
        def fail(path: Path) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        committer = Committer(runtime, tmp_path)
        name, ending = f"r{runtime.rank}", []
        for step, writer in ((8, fail if runtime.rank == broken_rank else write("x")), (12, write("x"))):
            committer.begin(step, {name: writer}, background=background)
            ending.append(committer.poll(wait=True))
            assert committer.failed == (step == 8)
        return ending[0], ending[1]

    one, other = run_ranks(2, work)
    assert one == other
    failed, saved = one
    assert failed.path is None
    assert "[EIO] [Errno 5] Input/output error" in failed.problem
    assert ("rank 1" in failed.problem) == (broken_rank == 1)
    assert saved.path == tmp_path / "checkpoints" / "12"
    assert names_in(tmp_path / "checkpoints") == {"4", "12"}, "no trace of the one that failed"


class Unpicklable:
    def __reduce__(self) -> str:
        raise TypeError("cannot be pickled")


def test_an_object_that_cannot_be_written_is_a_failed_save(tmp_path: Path) -> None:
    (outcome,) = run_ranks(1, lambda runtime: save(runtime, tmp_path, 4, {"a": lambda path: torch.save(open, path)}))
    assert outcome.path == tmp_path / "checkpoints" / "4", "a builtin pickles by name"
    unpicklable = {"a": lambda path: torch.save(Unpicklable(), path), "b": lambda path: torch.save(lambda: 0, path)}
    for name, reason in (("a", "cannot be pickled"), ("b", "lambda")):
        given = {name: unpicklable[name]}
        (outcome,) = run_ranks(1, lambda runtime, given=given: save(runtime, tmp_path, 8, given))
        assert outcome.path is None
        assert reason in outcome.problem
    assert names_in(tmp_path / "checkpoints") == {"4"}


def test_three_failures_in_a_row_are_too_many_and_a_success_between_counts(tmp_path: Path) -> None:
    def work(runtime: Any) -> list[bool]:
        committer, gave_up = Committer(runtime, tmp_path), []
        for step, works in enumerate([False, False, True, False, False, False], start=1):
            committer.begin(step, {"a": write("x") if works else Path.read_text}, background=False)
            committer.poll()
            gave_up.append(committer.gave_up)
        return gave_up

    assert run_ranks(1, work) == [[False, False, False, False, False, True]]


def test_leftovers_of_killed_runs_go_away_with_the_next_save(tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints" / ".tmp-4-dead"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_text("half")
    run_ranks(1, lambda runtime: save(runtime, tmp_path, 8, {"a": write("x")}))
    assert names_in(tmp_path / "checkpoints") == {"8"}


def test_errors_of_the_disk_as_text(tmp_path: Path) -> None:
    torn = describe_failure(
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), tmp_path
    )
    assert "a write was cut short, as by a full disk" in torn
    assert "bytes are free on the disk of" in torn
    assert "[ENOSPC]" in describe_failure(OSError(errno.ENOSPC, "No space left on device"), tmp_path)


# ---- in a run ----


def test_nothing_but_complete_steps_has_a_number_for_a_name(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out))
    (out / "checkpoints" / ".tmp-16-0abc").mkdir()
    command = f'find {out}/checkpoints -mindepth 1 -maxdepth 1 -type d -printf "%f\\n" | sort -n | tail -n 1'
    assert subprocess.run(command, shell=True, capture_output=True, text=True).stdout == "12\n"
    assert valid_steps(out) == [4, 8, 12]
    pretrain(tiny(out, "trainer.max_steps=13", "trainer.resume_from_checkpoint=latest"))
    assert names_in(out / "checkpoints") == {"4", "8", "12", "13"}


def test_a_background_save_owns_what_it_writes(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    run = build_run(tiny(out, "trainer.async_save=true", "trainer.eval_steps=0"))
    announce(run)
    state = resume_or_start(run)
    steps = training_steps(run, state)
    state, _ = next(steps)
    weights = {name: tensor.clone() for name, tensor in run.module.state_dict().items()}
    moments = [s["exp_avg"].clone() for s in run.optimizer.state.values()]
    # The thread waits, so that training overwrites weights and moments before anything is written.
    monkeypatch.setenv("NEOBERT_FAULT", "commit.write.model.safetensors@1:sleep0.3")
    assert save_checkpoint(run, state) is None, "it is not there yet"
    with torch.no_grad():
        for tensor in [*run.module.parameters(), *(s["exp_avg"] for s in run.optimizer.state.values())]:
            tensor.fill_(7.0)
    assert complete_save(run) is None, "training continues while it is written"
    assert not valid_steps(out)
    path = complete_save(run, wait=True)
    assert path == out / "checkpoints" / "1"
    check_contents(path)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(path / "model.safetensors").items())
    saved = torch.load(path / "optimizer.bin", weights_only=True)["state"]
    assert all(torch.equal(saved[i]["exp_avg"], moment) for i, moment in enumerate(moments))
    steps.close()  # type: ignore[attr-defined]
    finish(run, state)


def test_a_run_that_saves_in_the_background_saves_the_same(tiny: Tiny, tmp_path: Path) -> None:
    blocking, background = tmp_path / "blocking", tmp_path / "background"
    dropout = "model.dropout_prob=0.1"
    pretrain(tiny(blocking, dropout))
    pretrain(tiny(background, dropout, "trainer.async_save=true", "trainer.save_steps=1", "trainer.save_total_limit=9"))
    assert valid_steps(background) == list(range(4, 13)), "one is in flight at most and none is lost"
    assert exact_steps(blocking) == exact_steps(background)
    for step in (4, 8, 12):
        for name in ("model.safetensors", "optimizer.bin", "random_states_0.pkl"):
            one, other = (run / "checkpoints" / str(step) / name for run in (blocking, background))
            assert one.read_bytes() == other.read_bytes()
    resumed = tmp_path / "resumed"
    pretrain(tiny(resumed, dropout, f"trainer.resume_from_checkpoint={background / 'checkpoints' / '5'}"))
    assert exact_steps(resumed) == exact_steps(blocking, after=5)


def test_the_log_is_written_up_to_the_step_before_its_checkpoint_is_there(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "run", []
    real = os.rename

    def rename(source: str, target: str) -> None:
        if Path(target).name.isdecimal():
            steps = [x for x in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if x["kind"] == "step"]
            seen.append((int(Path(target).name), steps[-1]["step"]))
        real(source, target)

    monkeypatch.setattr(commit.os, "rename", rename)
    pretrain(tiny(out, "trainer.logging_steps=0", "trainer.eval_steps=0"))
    assert seen == [(4, 4), (8, 8), (12, 12)]


def test_a_save_in_flight_adds_no_collective_to_a_step(tmp_path: Path) -> None:
    """Whether it is written is part of the sum that a step makes anyway."""
    release = threading.Event()

    def work(runtime: Any) -> Any:
        committer = Committer(runtime, tmp_path)

        def write_slowly(path: Path) -> None:
            assert release.wait(60)
            path.write_text("x")

        committer.begin(4, {f"file_{runtime.rank}": write_slowly}, background=True)
        before = runtime.num_collectives
        assert committer.poll() is None, "no step has agreed on it so far"
        committer.agree(2)
        assert committer.poll() is None
        assert runtime.num_collectives == before
        release.set()
        while committer.is_writing():
            time.sleep(0.01)
        committer.agree(0)
        outcome = committer.poll()
        return outcome and outcome.path

    assert run_ranks(2, work) == [tmp_path / "checkpoints" / "4"] * 2
