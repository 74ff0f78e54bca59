"""Killed at a named point, then continued: the result is that of the run that was left alone."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from ports import free_port
from records import exact_steps, log_lines

from neobert.benchmark.lives import Lives
from neobert.config.load import config_to_yaml
from neobert.config.schema import Config
from neobert.train.loop import pretrain
from neobert.weights.folder import check_contents, checkpoint_steps, choose_newest

Tiny = Callable[..., Config]

RUN = ["model.dropout_prob=0.1", "trainer.save_total_limit=2", "trainer.gradient_accumulation_steps=2"]
ASYNC = ["trainer.async_save=true"]

SAMPLED = {
    "step.done@7": (4, []),
    "commit.written.model.safetensors@8": (4, []),
    "commit.written.tokenizer@8": (4, ASYNC),
    "commit.manifest@8": (4, []),
    "commit.renamed@8": (8, []),
    "prune.renamed@4": (12, []),
}
"""Point -> the step that the next start resumes from, further settings."""

IN_FULL = {
    "step.done@1": (None, []),
    "step.done@12": (12, []),
    "commit.staged@4": (None, []),
    "commit.staged@8": (4, []),
    "commit.write.random_states_0.pkl@8": (4, []),
    "commit.written.random_states_0.pkl@8": (4, ASYNC),
    "commit.written.optimizer.bin@8": (4, []),
    "commit.written.scheduler.bin@8": (4, []),
    "commit.written.custom_checkpoint_0.pkl@8": (4, []),
    "commit.written.train_state.json@8": (4, []),
    "commit.written.config.yaml@8": (4, []),
    "commit.written.model.safetensors@12": (8, ASYNC),
    "commit.manifest@12": (8, ASYNC),
    "commit.renamed@12": (12, ASYNC),
    "commit.flushed@8": (8, []),
    "prune.before@4": (12, []),
}


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    parent = Lives()
    yield parent
    parent.close()


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    pretrain(tiny(out, *RUN))
    return out


def weights_of(run: Path) -> str:
    return sha256((run / "checkpoints/12/model.safetensors").read_bytes()).hexdigest()


def start(lives: Lives, folder: Path, config: Config, *overrides: str, fault: str = "", world: int = 1) -> list[int]:
    """Starts a run and waits for its end; its output is in `folder/output`."""
    config_file = folder / "run.yaml"
    config_file.write_text(config_to_yaml(config))
    variables = {"NEOBERT_FAULT": fault} if fault else {}
    if world > 1:
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    lives.start(config_file, overrides, folder / "output", variables=variables, world=world)
    return lives.wait()


def check_killed_and_continued(
    lives: Lives, tiny: Tiny, folder: Path, whole: Path, point: str, resumes_from: int | None, more: list[str]
) -> None:
    out = folder / "run"
    config = tiny(out, *RUN, *more)
    assert start(lives, folder, config, fault=point) == [-signal.SIGKILL]
    for step in checkpoint_steps(out):
        check_contents(out / "checkpoints" / str(step))
    found = choose_newest(out)
    assert (found.path, found.notes) == (resumes_from and out / "checkpoints" / str(resumes_from), ())
    assert start(lives, folder, config, "trainer.resume_from_checkpoint=latest") == [0], (folder / "output").read_text()
    assert exact_steps(out) == exact_steps(whole)
    assert weights_of(out) == weights_of(whole)
    last = 12
    if resumes_from == last:  # There was nothing left to save; the next save sweeps.
        last, extend = 16, ["trainer.resume_from_checkpoint=latest", "trainer.max_steps=16"]
        assert start(lives, folder, config, *extend) == [0]
    names = {p.name for p in (out / "checkpoints").iterdir()}
    assert names == {str(last - 4), str(last)}, "leftovers are swept"


@pytest.mark.parametrize("point", SAMPLED)
def test_kill_and_continue(lives: Lives, tiny: Tiny, tmp_path: Path, whole: Path, point: str) -> None:
    check_killed_and_continued(lives, tiny, tmp_path, whole, point, *SAMPLED[point])


@pytest.mark.full
@pytest.mark.parametrize("point", IN_FULL)
def test_kill_and_continue_everywhere(lives: Lives, tiny: Tiny, tmp_path: Path, whole: Path, point: str) -> None:
    check_killed_and_continued(lives, tiny, tmp_path, whole, point, *IN_FULL[point])


def test_three_kills_in_one_run(lives: Lives, tiny: Tiny, tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    config = tiny(out, *RUN)
    for point in ("step.done@5", "step.done@6", "step.done@11"):
        assert start(lives, tmp_path, config, "trainer.resume_from_checkpoint=latest", fault=point) == [-9]
    assert start(lives, tmp_path, config, "trainer.resume_from_checkpoint=latest") == [0]
    assert exact_steps(out) == exact_steps(whole)
    assert weights_of(out) == weights_of(whole)


def test_killed_soon_after_a_request_to_end(lives: Lives, tiny: Tiny, tmp_path: Path, whole: Path) -> None:
    """SIGTERM during a save, and SIGKILL before the save has ended: the checkpoint before is there, and is enough."""
    out = tmp_path / "run"
    config_file = tmp_path / "run.yaml"
    config_file.write_text(config_to_yaml(tiny(out, *RUN)))
    fault = {"NEOBERT_FAULT": "commit.written.optimizer.bin@8:sleep20"}
    (pid,) = lives.start(config_file, [], tmp_path / "output", variables=fault)
    deadline = time.monotonic() + 60
    while not any(out.glob("checkpoints/.tmp-8-*/optimizer.bin")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    assert lives.wait()[0] in (-signal.SIGTERM, -signal.SIGKILL)
    assert choose_newest(out).path == out / "checkpoints" / "4"
    assert start(lives, tmp_path, tiny(out, *RUN), "trainer.resume_from_checkpoint=latest") == [0]
    assert exact_steps(out) == exact_steps(whole)


TWO = ["trainer.max_steps=8", "trainer.global_batch_size=8", "trainer.per_device_train_batch_size=4"]


def test_one_of_two_ranks_killed_in_the_middle_of_a_save(lives: Lives, tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    started = time.monotonic()
    fault = "commit.written.random_states_1.pkl@8:kill:1"
    config = tiny(out, *TWO, "trainer.rank_timeout_seconds=2")
    codes = start(lives, tmp_path, config, fault=fault, world=2)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0, "the other rank ends with an error"
    assert time.monotonic() - started < 60, "and does not wait forever"
    assert checkpoint_steps(out) == [4]
    assert choose_newest(out).path == out / "checkpoints" / "4"


@pytest.mark.parametrize("more", [pytest.param([], marks=pytest.mark.full), ASYNC], ids=["blocking", "background"])
def test_one_of_two_ranks_cannot_write(lives: Lives, tiny: Tiny, tmp_path: Path, more: list[str]) -> None:
    out = tmp_path / "run"
    fault = "commit.write.random_states_1.pkl@4:eio:1"
    codes = start(lives, tmp_path, tiny(out, *TWO, *more), fault=fault, world=2)
    assert codes == [0, 0], (tmp_path / "output").read_text()
    assert checkpoint_steps(out) == [8], "the save that failed left nothing, the next one is complete"
    assert not list(out.glob("checkpoints/.tmp-*"))
    assert check_contents(out / "checkpoints" / "8").world_size == 2
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    failed = [e for e in events if e["event"] == "save_failed"]
    assert [e["step"] for e in failed] == [4]
    assert "rank 1: [EIO]" in failed[0]["problem"]
    assert [x["step"] for x in log_lines(out, "step")] == list(range(1, 9))
