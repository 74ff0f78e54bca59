"""The figures of a logging interval, from the steps in it."""

import math

import pytest
import torch

from neobert.train.metrics import Interval, StepRecord, summarise
from neobert.types import StepMetrics


def record(*, loss_sum: float, num_targets: int, num_tokens: int, skipped: bool = False) -> StepRecord:
    metrics = StepMetrics(
        loss_sum=torch.tensor(loss_sum),
        micro_losses=torch.tensor([loss_sum]),
        num_correct=None,
        grad_norm=torch.tensor(2.0),
        skipped=torch.tensor(skipped),
        row_keys=(),
        num_targets=num_targets,
        num_tokens=num_tokens,
        num_documents=1,
        num_slots=100,
        attended_tokens=30 * num_tokens,
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
        metrics=metrics,
    )


def test_skipped_steps_count_in_time_and_tokens_only() -> None:
    steps = [
        record(loss_sum=30.0, num_targets=10, num_tokens=80),
        record(loss_sum=70.0, num_targets=15, num_tokens=60),
        record(loss_sum=math.inf, num_targets=15, num_tokens=60, skipped=True),
    ]
    assert summarise(steps, 4.0) == Interval(
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
    found = summarise([record(loss_sum=math.nan, num_targets=10, num_tokens=80, skipped=True)], 1.0)
    assert math.isnan(found.loss)
    assert (found.grad_norm, found.accuracy, found.num_skipped) == (None, 0.0, 1)
