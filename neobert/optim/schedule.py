"""Learning rates, and the momentum of Muon, as pure functions of the step, so that nothing about them needs saving.

Steps count from 0. With W warm-up steps, end of decay E, C steps of cool-down and final ratio f, the learning rate is
the base rate times

    (step + 1) / (W + 1)                 step < W          never 0; the base rate is reached at step W
    body(step)                           W <= step < E - C
    f + (body(E - C) - f) * shape(x)     E - C <= step < E   x = (step - (E - C)) / C
    f                                    step >= E           where there is a decay or a cool-down

`cosine` and `linear` decay from the warm-up on: body = f + (1 - f) * shape((step - W) / (E - W)), and C is 0.
`constant` and `wsd` (warm-up, stable, decay: Hu et al., arXiv 2404.06395) stay at 1; `inverse_sqrt` falls as
sqrt((W + 1) / (step + 1)), not below f (Vaswani et al., arXiv 1706.03762, equation 3, with steps counted from 1). Their
cool-down has one of three shapes, falling from 1 to 0: 1 - x, 1 - sqrt(x) (Hagele et al., arXiv 2405.18392) or
(1 + cos(pi x)) / 2. Without a cool-down they continue forever.

E is a step of the run, not a duration; C is a duration that ends there. Worked examples, base 1, W = 3, f = 0.2:

    linear, E = 7          0.25 0.5 0.75 | 1 0.8 0.6 0.4 | 0.2 0.2 ...
    wsd, E = 9, C = 4      0.25 0.5 0.75 | 1 1 | 1 0.8 0.6 0.4 | 0.2 ...   (linear cool-down)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from neobert.config.schema import SchedulerSection
from neobert.config.schema_optimizer import MUON, OptimizerSection


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A learning rate for every step of a run."""

    section: SchedulerSection
    """Has the name, the shape of the cool-down and the final ratio."""

    base_lr: float
    warmup_steps: int
    """Steps below the base rate."""

    decay_steps: int
    """Step at which the final rate is reached, counted from the start of the run; later than `warmup_steps`."""

    cooldown_steps: int
    """Length of the decay that ends at `decay_steps`; at most `decay_steps - warmup_steps`. 0: none."""

    def __call__(self, step: int) -> float:
        """The learning rate of `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.base_lr * (step + 1) / (self.warmup_steps + 1)
        return self.base_lr * self._factor(step)

    def _factor(self, step: int) -> float:
        section = self.section
        body, start = SCHEDULES[section.name], self.decay_steps - self.cooldown_steps
        if not self.cooldown_steps or step < start:
            return body(self, step)
        if step >= self.decay_steps:
            return section.final_lr_ratio
        factor = COOLDOWNS[section.cooldown_shape]((step - start) / self.cooldown_steps)
        return section.final_lr_ratio + (body(self, start) - section.final_lr_ratio) * factor


def build_schedule(section: SchedulerSection, *, base_lr: float, num_steps: int) -> Schedule:
    """The schedule of a run of `num_steps`.

    Percents (0-100, rounded down to a step) refer to `total_steps`, which is `num_steps` where it is None, and win over
    steps. The decay ends at `total_steps` unless said otherwise. A warm-up longer than that is cut to it, an end of
    decay before the end of the warm-up is moved after it, and a cool-down longer than the steps between the two is cut
    to them. Raises ValueError for an unknown name or shape.
    """
    if section.name not in SCHEDULES:
        raise ValueError(f"scheduler.name: {section.name!r} is unknown; write one of {', '.join(SCHEDULES)}")
    if section.cooldown_shape not in COOLDOWNS:
        raise ValueError(
            f"scheduler.cooldown_shape: {section.cooldown_shape!r} is unknown; write one of {', '.join(COOLDOWNS)}"
        )
    total = num_steps if section.total_steps is None else section.total_steps

    def choose(steps: int | None, percent: float | None) -> int | None:
        return steps if percent is None else int(total * percent / 100)

    warmup_steps = min(choose(section.warmup_steps, section.warmup_percent) or 0, total)
    decay_steps = choose(section.decay_steps, section.decay_percent)
    end = max(total if decay_steps is None else decay_steps, warmup_steps + 1)
    cooldown_steps = choose(section.cooldown_steps, section.cooldown_percent) or 0
    return Schedule(
        section=section,
        base_lr=base_lr,
        warmup_steps=warmup_steps,
        decay_steps=end,
        cooldown_steps=min(cooldown_steps, end - warmup_steps),
    )


def choose_muon_beta(section: OptimizerSection, step: int, *, end: int) -> float | None:
    """The `muon_beta` of `step`, counted from 0; None where it is constant, or there is none.

    It rises linearly from `muon_beta_start`, and falls back to it in the steps before `end`, as in records of
    modded-nanogpt (K. Jordan et al., 2024).
    """
    muon = section.muon_config
    if section.name not in MUON or muon.muon_beta_start is None:
        return None
    rising = step / muon.muon_beta_warmup_steps if muon.muon_beta_warmup_steps else 1.0
    falling = (end - step) / muon.muon_beta_cooldown_steps if muon.muon_beta_cooldown_steps else 1.0
    return muon.muon_beta_start + (muon.muon_beta - muon.muon_beta_start) * max(0.0, min(rising, falling, 1.0))


def _linear(x: float) -> float:
    return 1 - x


def _cosine(x: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * x))


def _decaying(shape: Callable[[float], float]) -> Callable[[Schedule, int], float]:
    """A decay that fills the time from the warm-up to `decay_steps`."""

    def factor(schedule: Schedule, step: int) -> float:
        floor, start, end = schedule.section.final_lr_ratio, schedule.warmup_steps, schedule.decay_steps
        return floor if step >= end else floor + (1 - floor) * shape((step - start) / (end - start))

    return factor


def _constant(schedule: Schedule, step: int) -> float:
    return 1.0


def _inverse_sqrt(schedule: Schedule, step: int) -> float:
    return max(schedule.section.final_lr_ratio, math.sqrt((schedule.warmup_steps + 1) / (step + 1)))


COOLDOWNS: dict[str, Callable[[float], float]] = {
    "linear": _linear,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": _cosine,
}
"""Shapes of the cool-down: progress from 0 to 1, to a factor from 1 to 0."""

SCHEDULES: dict[str, Callable[[Schedule, int], float]] = {
    "cosine": _decaying(_cosine),
    "linear": _decaying(_linear),
    "constant": _constant,
    "wsd": _constant,
    "inverse_sqrt": _inverse_sqrt,
}
"""Factor of the base rate at a step after the warm-up and before the cool-down."""
