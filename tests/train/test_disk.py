"""A disk that is full, broken or gone: old checkpoints stay, the run continues, and ends when it must."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from records import exact_steps, log_lines

from neobert.cli import EXIT_CODES
from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.train import loop, start
from neobert.train.checkpoint import save as checkpoint
from neobert.train.loop import pretrain
from neobert.train.record import sinks
from neobert.weights.folder import check_contents, checkpoint_steps, valid_steps

Tiny = Callable[..., Config]


def events_of(out: Path, kind: str) -> list[dict]:
    return [e for e in map(json.loads, (out / "events.jsonl").read_text().splitlines()) if e["event"] == kind]


def test_a_failed_save_is_tried_again_at_the_next_interval(
    tiny: Tiny,
    whole_run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, out = whole_run(), tmp_path / "run"
    monkeypatch.setenv("NEOBERT_FAULT", "commit.write.optimizer.bin@8:enospc")
    result = pretrain(tiny(out))
    assert (result.reason, result.state.step) == ("finished", 12)
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"4", "12"}
    (event,) = events_of(out, "save_failed")
    assert event["step"] == 8
    assert "[ENOSPC] [Errno 28] No space left on device" in event["problem"]
    assert "bytes are free on the disk of" in event["problem"]
    assert (
        "older checkpoints are untouched, training continues and the next save tries again" in capsys.readouterr().out
    )
    assert exact_steps(out) == exact_steps(whole)


@pytest.mark.parametrize("more", [[], ["trainer.async_save=true"]], ids=["blocking", "background"])
def test_three_failures_in_a_row_stop_the_run_and_leave_the_old_checkpoint(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, "trainer.max_steps=4"))
    before = check_contents(out / "checkpoints" / "4")
    monkeypatch.setenv("NEOBERT_FAULT", "commit.write.model.safetensors@*:eio")
    resume = ["trainer.resume_from_checkpoint=latest", "trainer.max_steps=100", "trainer.save_total_limit=1", *more]
    result = pretrain(tiny(out, *resume))
    assert result.reason == "disk"
    assert EXIT_CODES[result.reason] == 74
    # Blocking: the saves of 8, 12 and 16 fail, and the one at the end. In the background the third failure is noticed
    # when its thread has ended.
    assert 16 <= result.state.step <= 20
    assert [e["step"] for e in events_of(out, "save_failed")][:3] == [8, 12, 16]
    assert check_contents(out / "checkpoints" / "4") == before
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"4"}
    monkeypatch.delenv("NEOBERT_FAULT")
    assert pretrain(tiny(out, "trainer.resume_from_checkpoint=latest")).reason == "finished"


def test_a_run_whose_last_save_fails_did_not_finish_well(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEOBERT_FAULT", "commit.staged@12:enospc")
    result = pretrain(tiny(tmp_path / "run"))
    assert (result.state.step, result.reason) == (12, "disk")
    assert checkpoint_steps(tmp_path / "run") == [4, 8]


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("limit", "words"), [(60_000, "File too large"), (200_000, "a write was cut short, as by a full disk")]
)
def test_a_file_that_really_cannot_be_written(tiny: Tiny, tmp_path: Path, limit: int, words: str) -> None:
    """60 kB stop safetensors, 200 kB stop torch, whose own message is about positions."""
    out = tmp_path / "run"
    with largest_file(limit):
        result = pretrain(tiny(out, "trainer.max_steps=8"))
    assert result.reason == "disk"
    assert checkpoint_steps(out) == []
    assert all(words in e["problem"] for e in events_of(out, "save_failed"))
    assert [x["step"] for x in log_lines(out, "step")] == list(range(1, 9)), "the run itself continued"


def test_the_output_folder_is_removed_while_the_run_runs(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    due = checkpoint.save_is_due

    def remove_then_ask(run: object, step: int) -> bool:
        if step == 8:
            shutil.rmtree(out)
        return due(run, step)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "save_is_due", remove_then_ask)
    result = pretrain(tiny(out, "trainer.max_steps=100"))
    assert (result.reason, result.state.step) == ("disk", 8), "trying again cannot help"
    printed = capsys.readouterr().out
    assert f"trainer.output_dir: {out} was removed while the run was writing into it" in printed
    assert "this cannot be tried again" in printed
    assert not out.exists(), "nothing is made up instead"


def test_lines_that_could_not_be_written_come_with_the_next_ones(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, real, calls = tmp_path / "run", sinks.os.fsync, []

    def fail_sometimes(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) in (3, 4):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(sinks, "os", SimpleNamespace(**{**vars(sinks.os), "fsync": fail_sometimes}))
    pretrain(tiny(out, "trainer.save_model=false"))
    assert [x["step"] for x in log_lines(out, "step")] == list(range(1, 13))
    assert "a record could not be written ([Errno 28] No space left on device)" in capsys.readouterr().out


def test_too_little_space_stops_before_the_first_step(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(start.shutil, "disk_usage", lambda path: SimpleNamespace(free=500_000))
    with pytest.raises(
        StartupError, match=r"has 500,000 bytes free, and checkpoints of about \d\d\d,\d\d\d bytes need"
    ):
        pretrain(tiny(out))
    assert pretrain(tiny(out, "trainer.save_model=false", "trainer.max_steps=1")).state.step == 1


def test_the_estimate_is_the_size_of_a_checkpoint(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimates = []
    real = start.check_free_space
    monkeypatch.setattr(
        "neobert.train.checkpoint.resume.check_free_space", lambda out, size: (estimates.append(size), real(out, size))
    )
    pretrain(tiny(tmp_path / "run", "trainer.max_steps=1", "model.hidden_size=128", "model.intermediate_size=512"))
    (estimate,) = estimates
    assert estimate == pytest.approx(check_contents(tmp_path / "run/checkpoints/1").num_bytes, rel=0.03)


def test_an_output_folder_that_cannot_be_made(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match=r"trainer.output_dir: .*/file/run cannot be made"):
        pretrain(tiny(tmp_path / "file" / "run"))
    assert valid_steps(tmp_path / "file") == []
