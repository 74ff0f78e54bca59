"""Learning rates as a table of values."""

import math
from typing import Any

import pytest

from neobert.config.schema import SchedulerSection
from neobert.optim.schedule import COOLDOWNS, SCHEDULES, Schedule, build_schedule


def build(*, base_lr: float = 1.0, num_steps: int = 200, **section: Any) -> Schedule:
    values = {"name": "linear", "warmup_steps": 10, **section}
    return build_schedule(SchedulerSection(**values), base_lr=base_lr, num_steps=num_steps)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2, 0.2, 0.2]),
    ],
)
def test_table(name: str, expected: list[float]) -> None:
    schedule = build(name=name, warmup_steps=3, decay_steps=7, final_lr_ratio=0.2)
    assert [schedule(step) for step in range(10)] == pytest.approx(expected)
    assert schedule(1_000_000) == pytest.approx(0.2)


W = [0.25, 0.5, 0.75]
"""A warm-up of 3 steps."""


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("constant", {}, [*W, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("constant", {"cooldown_steps": 2, "cooldown_shape": "linear"}, [*W, 1, 1, 1, 1, 1, 1, 0.6, 0.2, 0.2]),
        ("wsd", {"cooldown_steps": 4, "cooldown_shape": "linear"}, [*W, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        (
            "wsd",
            {"cooldown_steps": 4},  # 1 - sqrt: 0.2 + 0.8 * (1 - sqrt(x)) at x = 0, 1/4, 2/4, 3/4
            [*W, 1, 1, 1, 1, 0.6, 1 - 0.8 * math.sqrt(0.5), 1 - 0.8 * math.sqrt(0.75), 0.2, 0.2],
        ),
        (
            "wsd",
            {"cooldown_steps": 4, "cooldown_shape": "cosine"},
            [*W, 1, 1, 1, 1, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2, 0.2],
        ),
        # sqrt(4 / (step + 1)), and a cool-down from where it is at step 8 down to 0.2.
        ("inverse_sqrt", {}, [*W, 1, *(math.sqrt(4 / n) for n in range(5, 13))]),
        (
            "inverse_sqrt",
            {"cooldown_steps": 2, "cooldown_shape": "linear"},
            [*W, 1, *(math.sqrt(4 / n) for n in (5, 6, 7, 8, 9)), 0.2 + (2 / 3 - 0.2) / 2, 0.2, 0.2],
        ),
        (
            "wsd",
            {"cooldown_steps": 7, "cooldown_shape": "linear"},
            [*W, *(0.2 + 0.8 * n / 7 for n in (7, 6, 5, 4, 3, 2, 1)), 0.2, 0.2],
        ),
    ],
)
def test_stable_parts_and_cooldowns(name: str, settings: dict[str, Any], expected: list[float]) -> None:
    schedule = build(name=name, warmup_steps=3, decay_steps=10, final_lr_ratio=0.2, **settings)
    assert [schedule(step) for step in range(12)] == pytest.approx(expected)


@pytest.mark.parametrize("shape", COOLDOWNS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_starts_at_the_base_and_ends_at_the_floor(name: str, shape: str) -> None:
    cooldown = 0 if name in ("cosine", "linear") else 20
    schedule = build(
        name=name,
        base_lr=3e-4,
        warmup_steps=0,
        decay_steps=50,
        final_lr_ratio=0.1,
        cooldown_steps=cooldown,
        cooldown_shape=shape,
    )
    rates = [schedule(step) for step in range(60)]
    assert rates[0] == pytest.approx(3e-4)
    assert rates == sorted(rates, reverse=True)
    assert rates[49] > rates[50] == pytest.approx(3e-5)


def test_inverse_sqrt_stops_at_the_final_ratio() -> None:
    schedule = build(name="inverse_sqrt", base_lr=2.0, warmup_steps=3, decay_steps=10, final_lr_ratio=0.5)
    assert [schedule(step) for step in (14, 15, 16, 1000)] == pytest.approx([2 * math.sqrt(4 / 15), 1.0, 1.0, 1.0])


def test_a_branch_equals_its_trunk_until_the_decay_starts() -> None:
    trunk = build(name="constant", num_steps=100)
    branch = build(name="wsd", num_steps=60, cooldown_steps=20)
    assert [trunk(step) for step in range(41)] == [branch(step) for step in range(41)]
    assert trunk(41) > branch(41)


@pytest.mark.parametrize(
    ("changes", "cooldown"),
    [
        ({}, 0),
        ({"cooldown_steps": 30}, 30),
        ({"cooldown_steps": 3, "cooldown_percent": 12.75}, 25),
        ({"total_steps": 1000, "cooldown_percent": 10}, 100),
        ({"cooldown_steps": 500}, 190),  # cut to what the warm-up leaves
        ({"cooldown_steps": 50, "decay_steps": 40}, 30),
    ],
)
def test_length_of_the_cooldown(changes: dict[str, Any], cooldown: int) -> None:
    assert build(name="wsd", **changes).cooldown_steps == cooldown


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
    schedule = build(**changes)
    assert (schedule.warmup_steps, schedule.decay_steps) == (warmup, decay)


def test_an_unknown_schedule_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"scheduler\.name: 'step' is unknown; write one of cosine, linear"):
        build(name="step")
    with pytest.raises(ValueError, match=r"scheduler\.cooldown_shape: 'sqrt' is unknown; write one of linear, 1-sqrt"):
        build(name="wsd", cooldown_shape="sqrt")
