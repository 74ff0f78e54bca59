"""Learning rates as a table of values."""

import math
from typing import Any

import pytest

from neobert.optim.schedule import SCHEDULES, Schedule, build_schedule, learning_rate


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2, 0.2, 0.2]),
    ],
)
def test_table(name: str, expected: list[float]) -> None:
    schedule = Schedule(name=name, base_lr=1.0, warmup_steps=3, decay_steps=7, final_lr_ratio=0.2)
    assert [schedule(step) for step in range(10)] == pytest.approx(expected)
    assert schedule(1_000_000) == pytest.approx(0.2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_starts_at_the_base_and_ends_at_the_floor(name: str) -> None:
    rates = [
        learning_rate(s, name=name, base_lr=3e-4, warmup_steps=0, decay_steps=50, final_lr_ratio=0.1) for s in range(60)
    ]
    assert rates[0] == pytest.approx(3e-4)
    assert rates == sorted(rates, reverse=True)
    assert rates[49] > rates[50] == pytest.approx(3e-5)


def settled(**changes: Any) -> Schedule:
    values: dict[str, Any] = {
        "name": "linear",
        "base_lr": 1.0,
        "warmup_steps": 10,
        "warmup_percent": None,
        "decay_steps": None,
        "decay_percent": None,
        "total_steps": None,
        "final_lr_ratio": 0.1,
        "num_steps": 200,
    }
    return build_schedule(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "warmup", "decay"),
    [
        ({}, 10, 200),
        ({"decay_steps": 150}, 10, 150),
        ({"warmup_percent": 2.75, "decay_percent": 90}, 5, 180),
        ({"warmup_percent": 0, "decay_percent": 50, "decay_steps": 3}, 0, 100),
        ({"total_steps": 1000, "warmup_percent": 1}, 10, 1000),
        ({"warmup_steps": 5000}, 200, 201),
        ({"warmup_steps": 100, "decay_steps": 50}, 100, 101),
    ],
)
def test_percents_and_defaults(changes: dict[str, Any], warmup: int, decay: int) -> None:
    schedule = settled(**changes)
    assert (schedule.warmup_steps, schedule.decay_steps) == (warmup, decay)


def test_an_unknown_schedule_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"scheduler\.name: 'step' is unknown; write one of cosine, linear"):
        settled(name="step")
    with pytest.raises(ValueError, match=r"scheduler\.name: 'step'"):
        learning_rate(0, name="step", base_lr=1.0, warmup_steps=1, decay_steps=2, final_lr_ratio=0.0)
