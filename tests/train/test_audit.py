"""After a crash: the steps made again are compared with the log of the first attempt."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import wait_for
from poison import fork_run
from ports import free_port
from records import exact_steps, log_lines

from neobert.config.schema import Config
from neobert.objectives.mlm import MaskedLM
from neobert.train.checkpoint.audit import RankLayout, ReplayAudit, ReplayDiverged, is_first_attempt, read_layout
from neobert.train.loop import pretrain
from neobert.types import LossSum

Tiny = Callable[..., Config]
HERE = RankLayout(processes=1, micro_batch_rows=4)


def make_line(step: int, **changes: Any) -> dict[str, Any]:
    base = {
        "kind": "step",
        "step": step,
        "loss": 2.0,
        "loss_hex": "0x1p+1",
        "grad_norm": 1.0,
        "grad_norm_hex": "0x1p+0",
    }
    return {**base, "lr": 1e-3, "batch_digest": "00ff", **changes}


def test_equal_steps_are_counted() -> None:
    audit = ReplayAudit([make_line(5), make_line(6), make_line(7)], before=HERE, now=HERE)
    assert audit.compare([make_line(4), make_line(5)]) is None
    assert not audit.done
    assert audit.verdict() == "replay audit: 1/1 steps bit-identical (of 3 in the log)"
    assert audit.compare([make_line(6), make_line(7), make_line(8)]) is None
    assert audit.done
    assert audit.verdict() == "replay audit: 3/3 steps bit-identical"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"batch_digest": "0100", "loss_hex": "0x1.8p+1", "loss": 3.0},
            "batch_digest was '00ff' and is '0100' (other rows or masks)",
        ),
        ({"lr": 2e-3, "loss_hex": "0x1.8p+1", "loss": 3.0}, "lr was 0.001 and is 0.002 (the schedule changed)"),
        ({"loss_hex": "0x1.8p+1", "loss": 3.0}, "loss_hex was '0x1p+1' and is '0x1.8p+1' (2.0 and 3.0)"),
        ({"grad_norm_hex": "nan", "grad_norm": None}, "grad_norm_hex was '0x1p+0' and is 'nan' (1.0 and None)"),
    ],
)
def test_the_first_difference_is_named_by_its_cause_and_only_once(changes: dict[str, Any], words: str) -> None:
    audit = ReplayAudit([make_line(5), make_line(6), make_line(7)], before=HERE, now=HERE)
    said = audit.compare([make_line(5), make_line(6, **changes)])
    assert said == f"replay audit: step 6 differs from its first attempt: {words}"
    assert audit.compare([make_line(7, **changes)]) is None
    assert audit.verdict() == "replay audit: 1/3 steps bit-identical"


def test_another_layout_compares_batches_and_reports_rounding() -> None:
    now = RankLayout(processes=2, micro_batch_rows=2)
    audit = ReplayAudit([make_line(5), make_line(6)], before=HERE, now=now)
    assert audit.compare([make_line(5), make_line(6, loss_hex=(2.0 + 3e-7).hex())]) is None
    assert audit.verdict() == (
        "replay audit: 2/2 batches identical; the layout changed from 1 process(es) x 4 rows to 2 process(es) x 2 "
        "rows, so losses may differ in rounding: by at most 3.0e-07"
    )


def test_what_the_events_tell() -> None:
    saved, back = {"event": "saved", "step": 4}, {"event": "rolled_back", "step": 4}
    assert is_first_attempt([])
    assert is_first_attempt([saved, back, saved])
    assert not is_first_attempt([saved, back, {"event": "skipped_step", "step": 6}])
    assert not is_first_attempt([saved, {"event": "source_switched", "step": 4}])
    assert read_layout([]) is None
    assert read_layout([{"event": "saved", "step": 4}]) is None, "written by an older version"
    assert read_layout([{"event": "saved", "step": 4, "processes": 1, "micro_batch_rows": 4}]) == HERE


def make_crashed_run(tiny: Tiny, out: Path, *overrides: str) -> None:
    """A run of 7 steps whose last checkpoint is that of step 4; a kill has torn the last line of both logs."""
    pretrain(tiny(out, *overrides, "trainer.max_steps=7", "scheduler.total_steps=12"))
    shutil.rmtree(out / "checkpoints/7")
    for name in ("log.jsonl", "events.jsonl"):
        with (out / name).open("a") as file:
            file.write('{"kind": "step", "step": 8, "lo')


def resumed(tiny: Tiny, out: Path, *overrides: str) -> Config:
    return tiny(out, "trainer.resume_from_checkpoint=latest", "scheduler.total_steps=12", *overrides)


def read_events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def test_a_torn_log_is_tolerated_and_the_repeated_steps_are_identical(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    make_crashed_run(tiny, out)
    pretrain(tiny(whole, "scheduler.total_steps=12"))
    capsys.readouterr()
    pretrain(resumed(tiny, out))
    assert "\nreplay audit: 3/3 steps bit-identical\n" in capsys.readouterr().out
    assert exact_steps(out) == exact_steps(whole)
    assert not list(out.glob("*.tmp"))
    (verdict,) = [event for event in read_events(out) if event["event"] == "replay_audit"]
    assert (verdict["verdict"], verdict["differ"]) == ("replay audit: 3/3 steps bit-identical", 0)


def shift_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the code that moves losses in their last bits."""
    forward = MaskedLM.forward

    def shifted(self: MaskedLM, batch: Any) -> LossSum:
        loss = forward(self, batch)
        return LossSum(loss_sum=loss.loss_sum * (1 + 2**-22), num_correct=loss.num_correct)

    monkeypatch.setattr(MaskedLM, "forward", shifted)


def test_a_code_change_that_moves_a_bit_is_reported(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    make_crashed_run(tiny, out)
    old = read_old_hex(out, 5)
    shift_losses(monkeypatch)
    assert pretrain(resumed(tiny, out)).reason == "finished"
    (new,) = [line["loss_hex"] for line in log_lines(out, "step") if line["step"] == 5]
    printed = capsys.readouterr().out
    words = f"replay audit: step 5 differs from its first attempt: loss_hex was {old!r} and is {new!r} ("
    assert printed.count(f"warning: {words}") == 1
    assert "\nreplay audit: 0/3 steps bit-identical\n" in printed
    assert [(e["event"], e.get("differ")) for e in read_events(out) if e["event"].startswith("replay")] == [
        ("replay_differs", None),
        ("replay_audit", 3),
    ]


def read_old_hex(out: Path, step: int) -> str:
    (line,) = [x for x in (out / "log.jsonl").read_text().splitlines() if f'"kind": "step", "step": {step},' in x]
    return json.loads(line)["loss_hex"]


def test_strict_stops_the_run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    make_crashed_run(tiny, out)
    shift_losses(monkeypatch)
    with pytest.raises(ReplayDiverged, match=r"step 5 differs.*loss_hex was .* and is .*replay_audit: strict stops"):
        pretrain(resumed(tiny, out, "trainer.replay_audit=strict"))


def test_a_run_that_ends_before_all_steps_are_repeated_says_how_many_were(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_crashed_run(tiny, tmp_path / "run")
    pretrain(resumed(tiny, tmp_path / "run", "trainer.max_steps=6"))
    assert "replay audit: 2/2 steps bit-identical (of 3 in the log)" in capsys.readouterr().out


def test_a_fresh_start_after_a_crash_before_the_first_checkpoint_is_audited_too(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    make_crashed_run(tiny, out, "trainer.save_steps=0")
    pretrain(resumed(tiny, out))
    assert "replay audit: 7/7 steps bit-identical" in capsys.readouterr().out


def test_more_processes_after_the_crash(tiny: Tiny, tmp_path: Path) -> None:
    out, port = tmp_path / "run", free_port()
    make_crashed_run(tiny, out)
    config = resumed(tiny, out, "trainer.per_device_train_batch_size=2", "trainer.replay_audit=strict")
    children = [fork_run(config, tmp_path / f"rank-{n}", rank=n, world=2, port=port) for n in (0, 1)]
    assert [wait_for(child) for child in children] == [0, 0], (tmp_path / "rank-0").read_text()
    said = (tmp_path / "rank-0").read_text()
    assert (
        "replay audit: 3/3 batches identical; the layout changed from 1 process(es) x 4 rows to 2 process(es)" in said
    )
