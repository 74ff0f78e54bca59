"""A run under the profiler: which steps are in the trace, whatever happens, and that no number changes."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from records import exact_steps, log_lines

from neobert.config.schema import Config
from neobert.train.loop import pretrain
from neobert.train.record import profiling

Tiny = Callable[..., Config]
WINDOW = ["trainer.profiler_steps_start=5", "trainer.profiler_steps=3"]


def traced_steps(output_dir: Path) -> list[int]:
    trace = json.loads((output_dir / "profiler_trace.json").read_text())
    marks = {e["name"] for e in trace["traceEvents"] if e["name"].startswith("ProfilerStep#")}
    assert marks >= {f"ProfilerStep#{step}" for step in trace["profiled_steps"]}
    assert not list(output_dir.glob(".tmp-*"))
    return trace["profiled_steps"]


def test_the_window_is_profiled_and_no_number_changes(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    pretrain(tiny(plain, "model.dropout_prob=0.1"))
    pretrain(tiny(watched, "model.dropout_prob=0.1", *WINDOW))
    assert exact_steps(watched) == exact_steps(plain)
    assert traced_steps(watched) == [5, 6, 7]
    assert not (plain / "profiler_trace.json").exists()
    assert not (watched / "snapshot.pickle").exists(), "there is no CUDA allocator here"
    profiled = {line["step"]: line.get("profiled_steps") for line in log_lines(watched, "log")}
    assert profiled == {3: None, 6: 2, 9: 1, 12: None}
    out = capsys.readouterr().out
    assert "tokens/s (slowed: 2 steps profiled)" in out
    assert "profiled steps 5 to 7" in out


def test_a_window_behind_the_end_of_the_budget_holds_the_steps_that_were_made(tiny: Tiny, tmp_path: Path) -> None:
    pretrain(tiny(tmp_path, "trainer.max_steps=6", *WINDOW))
    assert traced_steps(tmp_path) == [5, 6]


def test_a_resume_profiles_what_is_left_of_the_window_or_nothing(tiny: Tiny, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    pretrain(tiny(whole, "trainer.save_steps=6", *WINDOW))
    for step, expected in ((6, [7]), (12, None)):
        out = tmp_path / f"from-{step}"
        resume = f"trainer.resume_from_checkpoint={whole / 'checkpoints' / str(step)}"
        pretrain(tiny(out, "trainer.max_steps=14", "scheduler.total_steps=12", *WINDOW, resume))
        if expected is None:
            assert not (out / "profiler_trace.json").exists()
        else:
            assert traced_steps(out) == expected
            assert exact_steps(out)[:6] == exact_steps(whole, after=step)


def stop_after(step: int) -> Callable[[str, int], None]:
    def stop(point: str, number: int) -> None:
        if point == "step.done" and number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


def test_a_stop_inside_the_window_writes_the_steps_made(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neobert.train.loop.fault_point", stop_after(6))
    assert pretrain(tiny(tmp_path, *WINDOW)).reason == "preempted"
    assert traced_steps(tmp_path) == [5, 6]


def test_an_error_inside_the_window_writes_the_steps_made_and_is_raised(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEOBERT_FAULT", "step.done@5:eio")
    with pytest.raises(OSError, match="Input/output error"):
        pretrain(tiny(tmp_path, *WINDOW))
    assert traced_steps(tmp_path) == [5]


def test_a_trace_that_cannot_be_written_does_not_stop_the_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profiling, "TRACE", "no/such/folder.json")
    assert pretrain(tiny(tmp_path, *WINDOW)).reason == "finished"
    assert "could not be written" in capsys.readouterr().out
