"""Learning rates as pure functions of the step, so that nothing about them needs saving.

Steps count from 0. With W warm-up steps, end of decay E and final ratio f, the learning rate is the base rate times

    (step + 1) / (W + 1)             step < W        never 0; the base rate is reached at step W
    f + (1 - f) * shape(x)           W <= step < E   x = (step - W) / (E - W)
    f                                step >= E

where shape falls from 1 to 0: (1 + cos(pi x)) / 2 for `cosine`, 1 - x for `linear`. E is a step of the run, not a
duration. Worked example, linear, base 1, W = 3, E = 7, f = 0.2: 0.25 0.5 0.75 | 1 0.8 0.6 0.4 | 0.2 0.2 ...
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


def learning_rate(
    step: int, *, name: str, base_lr: float, warmup_steps: int, decay_steps: int, final_lr_ratio: float
) -> float:
    """The learning rate of `step`, by the formula above. Raises ValueError for an unknown name."""
    if name not in SCHEDULES:
        raise ValueError(f"scheduler.name: {name!r} is unknown; write one of {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return base_lr * (step + 1) / (warmup_steps + 1)
    if step >= decay_steps:
        return base_lr * final_lr_ratio
    progress = (step - warmup_steps) / (decay_steps - warmup_steps)
    return base_lr * (final_lr_ratio + (1 - final_lr_ratio) * SCHEDULES[name](progress))


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A learning rate for every step of a run."""

    name: str
    base_lr: float
    warmup_steps: int
    """Steps below the base rate."""

    decay_steps: int
    """Step at which the final rate is reached, counted from the start of the run; later than `warmup_steps`."""

    final_lr_ratio: float
    """Final rate over base rate."""

    def __call__(self, step: int) -> float:
        """The learning rate of `step`, counted from 0."""
        return learning_rate(
            step,
            name=self.name,
            base_lr=self.base_lr,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            final_lr_ratio=self.final_lr_ratio,
        )


def build_schedule(
    *,
    name: str,
    base_lr: float,
    warmup_steps: int,
    warmup_percent: float | None,
    decay_steps: int | None,
    decay_percent: float | None,
    total_steps: int | None,
    final_lr_ratio: float,
    num_steps: int,
) -> Schedule:
    """The schedule of a run of `num_steps`, from the fields of the `scheduler` section.

    Percents (0-100, rounded down to a step) refer to `total_steps`, which is `num_steps` where it is None, and win over
    steps. The decay ends at `total_steps` unless said otherwise. A warm-up longer than that is cut to it, and an end of
    decay before the end of the warm-up is moved behind it. Raises ValueError for an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"scheduler.name: {name!r} is unknown; write one of {', '.join(SCHEDULES)}")
    total = num_steps if total_steps is None else total_steps
    if warmup_percent is not None:
        warmup_steps = int(total * warmup_percent / 100)
    if decay_percent is not None:
        decay_steps = int(total * decay_percent / 100)
    warmup_steps = min(warmup_steps, total)
    return Schedule(
        name=name,
        base_lr=base_lr,
        warmup_steps=warmup_steps,
        decay_steps=max(total if decay_steps is None else decay_steps, warmup_steps + 1),
        final_lr_ratio=final_lr_ratio,
    )


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "linear": lambda x: 1 - x,
}
"""Shapes of the decay: progress from 0 to 1, to a factor from 1 to 0."""
