"""The metrics of a logging interval, from the steps in it, with and without a restart between them."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from records import log_lines
from rewriting import rewrite_manifest
from test_run import FakeWandb, install

from neobert.config.schema import Config
from neobert.train.loop import pretrain
from neobert.train.record.metrics import Interval, IntervalSums, StepRecord, summarise
from neobert.train.step import StepMetrics, StepResult
from neobert.types import StepCounts

Tiny = Callable[..., Config]
MEASURED = ("tokens_per_second", "data_wait", "seconds", "peak_memory_bytes")
"""Fields of a log line that differ between any two runs."""


def sum_up(steps: list[StepRecord], seconds: float) -> IntervalSums:
    return replace(reduce(lambda sums, step: sums.add(step, ["a"]), steps, IntervalSums()), seconds=seconds)


def record(*, loss_sum: float, num_targets: int, num_tokens: int, skipped: bool = False) -> StepRecord:
    metrics = StepMetrics(
        result=StepResult(
            loss_sum=torch.tensor(loss_sum),
            micro_losses=torch.tensor([loss_sum]),
            num_correct=None,
            grad_norm=torch.tensor(2.0),
            skipped=torch.tensor(skipped),
        ),
        row_keys=(),
        counts=StepCounts(num_targets, num_tokens, num_documents=1, num_slots=100, attended_tokens=30 * num_tokens),
        source_tokens=(num_tokens,),
        digest=0,
        lr=num_tokens / 1000,
        data_wait=0.5,
    )
    return StepRecord(
        step=1,
        loss_sum=loss_sum,
        num_correct=num_targets // 2,
        grad_norm=loss_sum / 10,
        skipped=skipped,
        digest=0,
        source_tokens=(num_tokens,),
        metrics=metrics,
    )


def test_skipped_steps_count_in_time_and_tokens_only() -> None:
    steps = [
        record(loss_sum=30.0, num_targets=10, num_tokens=80),
        record(loss_sum=70.0, num_targets=15, num_tokens=60),
        record(loss_sum=math.inf, num_targets=15, num_tokens=60, skipped=True),
    ]
    assert summarise(sum_up(steps, 4.0)) == Interval(
        loss=4.0,
        accuracy=12 / 25,
        grad_norm=7.0,
        lr=0.06,
        num_tokens=200,
        num_skipped=1,
        tokens_per_second=50.0,
        data_wait=0.375,
        packing_fill=pytest.approx(2 / 3),
        attended_length=30.0,
        predicted_fraction=0.2,
    )


def test_an_interval_of_skipped_steps_has_no_loss_and_no_norm() -> None:
    found = summarise(sum_up([record(loss_sum=math.nan, num_targets=10, num_tokens=80, skipped=True)], 1.0))
    assert math.isnan(found.loss)
    assert (found.grad_norm, found.accuracy, found.num_skipped) == (None, 0.0, 1)


def test_sums_that_were_saved_go_on_bit_for_bit() -> None:
    steps = [record(loss_sum=x / 7, num_targets=3, num_tokens=5 + x, skipped=x == 4) for x in range(1, 9)]
    whole = sum_up(steps, 1.0)
    for cut in range(len(steps) + 1):
        saved = json.loads(json.dumps({name: getattr(sum_up(steps[:cut], 1.0), name) for name in whole.__slots__}))
        rest = reduce(lambda sums, step: sums.add(step, ["a"]), steps[cut:], IntervalSums(**saved))
        assert rest == whole


def exact_lines(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in log_lines(out, "log")]


def cut_after(run: Path, step: int, to: Path) -> Path:
    """A copy of a run as a kill some steps after this checkpoint leaves it."""
    shutil.copytree(run, to)
    for path in (to / "checkpoints").iterdir():
        if path.name.isdecimal() and int(path.name) > step:
            shutil.rmtree(path)
    return to


@pytest.fixture(scope="module")
def mixed(tiny: Tiny, corpus: Path) -> Callable[..., Config]:
    mixture = f"[{{path: {corpus}/part-0.jsonl, weight: 2}}, {{path: {corpus}/part-1.jsonl.gz, weight: 1}}]"
    settings = [f"dataset.mixture={mixture}", "dataset.path=null", "trainer.logging_steps=5", "trainer.save_steps=1"]
    settings += ["trainer.log_train_accuracy=true", "trainer.log_statistics=true", "trainer.max_steps=7"]
    return lambda out, *more: tiny(out, *settings, "trainer.eval_strategy=no", *more)


@pytest.fixture(scope="module")
def whole(mixed: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    pretrain(mixed(out))
    return out


@pytest.mark.parametrize("steps", [(2, 4), (5,)])
def test_a_line_covers_its_whole_interval_over_restarts(
    mixed: Tiny, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...]
) -> None:
    fake, out = FakeWandb(), whole
    for step in steps:
        out = cut_after(out, step, tmp_path / f"cut-{step}")
        install(monkeypatch, fake)
        settings = ["wandb.enabled=true", f"wandb.dir={tmp_path}", "trainer.resume_from_checkpoint=latest"]
        pretrain(mixed(out, *settings))
    lines = exact_lines(out)
    assert lines == exact_lines(whole)
    assert [(line["first_step"], line["step"]) for line in lines] == [(1, 5), (6, 7)]
    assert all(len(line["source_tokens"]) == 2 for line in lines)
    steps = log_lines(out, "step")
    assert sum(sum(line["source_tokens"].values()) for line in lines) == sum(line["num_tokens"] for line in steps)
    logged = [values for values, _ in fake.sent if "train/loss" in values]
    assert logged[-1]["train/loss"] == lines[-1]["loss"]
    assert not any("train/partial_interval_steps" in values for values in logged)


def test_a_line_says_that_it_covers_a_part_after_a_checkpoint_without_sums(
    mixed: Tiny, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As earlier versions wrote them."""
    out = cut_after(whole, 2, tmp_path / "run")
    file = out / "checkpoints" / "2" / "train_state.json"
    state = json.loads(file.read_text())
    assert state.pop("interval")["num_steps"] == 2
    file.write_text(json.dumps(state))
    rewrite_manifest(file.parent)
    fake = FakeWandb()
    install(monkeypatch, fake)
    pretrain(mixed(out, "trainer.resume_from_checkpoint=2", "wandb.enabled=true", f"wandb.dir={tmp_path}"))
    first, second = log_lines(out, "log")
    assert (first["first_step"], first["step"], first["partial"]) == (3, 5, True)
    assert (second["first_step"], "partial" in second) == (6, False)
    assert "of the last 3 steps only (resumed in between)" in capsys.readouterr().out
    logged = [values for values, _ in fake.sent if "train/loss" in values]
    assert [values.get("train/partial_interval_steps") for values in logged] == [3, None]
