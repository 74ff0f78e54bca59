"""A ladder: small sizes of the dial, and what they say of a larger one before it is trained.

    L(P) = E + A P^-a

with P the parameters of a size, which learns from `tokens_per_parameter` P tokens: one law of the size, at a constant
ratio of tokens (the compute-optimal line of Hoffmann et al., arXiv 2203.15556, has this form).

The fit is a search over a, with E and A by linear least squares and not below 0: three numbers of four points need no
optimiser, and scipy is no dependency. The interval holds the predictions of every law whose chi squared is at most 3.84
above the best one (95%, profile likelihood), where each loss has the standard deviation `sigma` of a seed.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from neobert import cli
from neobert.benchmark.experiment_plan import Plan, PlannedRun, Variant, Workspace, build_job_config
from neobert.benchmark.experiments import SCORE, TrialResult, run_job, with_precision
from neobert.benchmark.loss_axis import build_axis
from neobert.benchmark.trial import describe_machine
from neobert.config.dial import DialSize
from neobert.config.shipped import SHIPPED
from neobert.disk import write_text
from neobert.train.hardware.device import measure_product

SIGMA = 0.02
"""Nats, of one seed."""

_CHI_SQUARED = 3.84
_EXPONENTS = np.geomspace(0.01, 3, 600)
_FLOORS = 400
_EFFICIENCY = 0.2
"""Of the rate of a large product alone: about 300 GFLOP/s at the yardstick, on two cores that each reach 550 to 870."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeLaw:
    """L(P) = floor + scale (P / reference)^-exponent."""

    floor: float
    scale: float
    exponent: float
    reference: float

    def __call__(self, parameters: float) -> float:
        return self.floor + self.scale * (parameters / self.reference) ** -self.exponent

    def describe(self) -> str:
        """As a formula in millions of parameters."""
        scale = self.scale * (self.reference / 1e6) ** self.exponent
        return f"L(P) = {self.floor:.3f} + {scale:.3f} (P / 1 million)^-{self.exponent:.3f}"


def fit_law(parameters: Sequence[float], losses: Sequence[float]) -> SizeLaw:
    """The law with the least squared error. Raises ValueError for fewer than three points."""
    if len(losses) < 3:
        raise ValueError(f"a law of three numbers needs three sizes or more, got {len(losses)}")
    reference = max(parameters)
    x, y = np.asarray(parameters, dtype=float) / reference, np.asarray(losses, dtype=float)
    best, least = (0.0, 0.0, 0.0), math.inf
    for exponent in _EXPONENTS:
        power = x**-exponent
        floor, scale = _fit_line(power, y)
        error = float(((floor + scale * power - y) ** 2).sum())
        if error < least:
            best, least = (floor, scale, float(exponent)), error
    return SizeLaw(floor=best[0], scale=best[1], exponent=best[2], reference=reference)


def _fit_line(power: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Floor and scale, both at least 0."""
    centred = power - power.mean()
    scale = max(0.0, float(centred @ y / max(centred @ centred, 1e-300)))
    floor = float(y.mean() - scale * power.mean())
    return (floor, scale) if floor >= 0 else (0.0, float(power @ y / (power @ power)))


def find_interval(
    parameters: Sequence[float], losses: Sequence[float], at: float, sigma: float = SIGMA
) -> tuple[float, float]:
    """Lowest and highest loss at `at` parameters of all laws that fit nearly as well as the best."""
    law = fit_law(parameters, losses)
    x, y = np.asarray(parameters, dtype=float) / law.reference, np.asarray(losses, dtype=float)
    floors = np.linspace(0, y.min(), _FLOORS)[:, None]
    found = [law(at)]
    least = sum((law(p) - loss) ** 2 for p, loss in zip(parameters, losses))
    for exponent in _EXPONENTS:
        power = x**-exponent
        squared, spare = power @ power, y[None, :] - floors
        scale = np.maximum(0.0, spare @ power / squared)[:, None]
        error = ((spare - scale * power) ** 2).sum(axis=1)
        # At each floor and exponent the scale may still move by what is left of the bound.
        left = (least + _CHI_SQUARED * sigma**2 - error) / squared
        inside = left >= 0
        if inside.any():
            move, target = np.sqrt(left[inside]), (at / law.reference) ** -exponent
            centre, bottom = scale[inside, 0], floors[inside, 0]
            found += [
                float((bottom + (centre - move) * target).min()),
                float((bottom + (centre + move) * target).max()),
            ]
    return min(found), max(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ladder:
    """What is trained, and where."""

    depths: tuple[int, ...]
    predict: int
    tokens_per_parameter: float
    workspace: Workspace
    sigma: float = SIGMA

    def size(self, depth: int) -> DialSize:
        """The size at a depth."""
        return DialSize(depth=depth, tokens_per_parameter=self.tokens_per_parameter)

    def plan(self) -> Plan:
        """All sizes as a plan of `neobert compare`: runs are made once, and continue after a kill."""
        variants = [
            Variant(name=f"depth{depth}", overrides=tuple(self.size(depth).overrides()), learning_rates=())
            for depth in (*self.depths, self.predict)
        ]
        return Plan(name="ladder", config=SHIPPED["dial"], seeds_at_best=0, variants=tuple(variants))


def estimate_seconds(ladder: Ladder, depths: Sequence[int], dtype: torch.dtype) -> float:
    """Of training these sizes here: their products at a part of the rate of one large product, measured now."""
    rate = measure_product(1024, 1024, 1024, dtype)
    return sum(ladder.size(depth).flops for depth in depths) / (_EFFICIENCY * rate)


def climb(ladder: Ladder, *, check: bool) -> str:
    """Trains and scores the sizes that are not there yet, predicts, and with `check` trains the predicted size too; the
    table. Progress on the error output.

    Raises:
        Stopped: a run was interrupted; the next start continues with it.
        ValueError: the numbers of a size went bad.
    """
    plan = ladder.plan()
    workspace = with_precision(plan, ladder.workspace)
    jobs = [PlannedRun(variant=variant, learning_rate=None, seed=0) for variant in plan.variants]
    bf16 = build_job_config(plan, jobs[0], workspace).trainer.mixed_precision == "bf16"
    trained = (*ladder.depths, ladder.predict) if check else ladder.depths
    missing = [depth for depth in trained if not (workspace.output / f"depth{depth}-seed0" / SCORE).is_file()]
    minutes = estimate_seconds(ladder, missing, torch.bfloat16 if bf16 else torch.float32) / 60
    cli.say(f"{len(missing)} sizes to train, roughly {minutes:,.0f} minutes on this CPU; a GPU takes less")
    losses: list[float] = []
    for job in jobs[:-1]:
        losses.append(_read_loss(job, run_job(plan, job, workspace)))
    result = predict(ladder, losses)
    cli.say(result["law"], _describe_prediction(ladder, result))
    if check:
        result["measured"] = _read_loss(jobs[-1], run_job(plan, jobs[-1], workspace))
    table = describe(ladder, result)
    write_text(workspace.output / "ladder.json", json.dumps({**result, **describe_machine()}, indent=1) + "\n")
    write_text(workspace.output / "ladder.md", table + "\n")
    write_text(workspace.output / "ladder.svg", draw(ladder, result))
    return table


def _read_loss(job: PlannedRun, outcome: TrialResult) -> float:
    cli.say(f"{job.name}: {outcome.describe()}")
    if outcome.loss is None:
        raise ValueError(
            f"{job.name}: its numbers went bad, so there is no law; try a lower --optimizer.lr with pretrain"
        )
    return outcome.loss


def predict(ladder: Ladder, losses: Sequence[float]) -> dict[str, Any]:
    """The law of the sizes, and what it says of the one that is not trained, JSON-ready."""
    parameters = [ladder.size(depth).parameters for depth in ladder.depths]
    law, at = fit_law(parameters, losses), ladder.size(ladder.predict).parameters
    return {
        "depths": list(ladder.depths),
        "losses": list(losses),
        "law": law.describe(),
        **{f"law_{name}": value for name, value in dataclasses.asdict(law).items()},
        "sigma": ladder.sigma,
        "predict": ladder.predict,
        "predicted": law(at),
        "interval": find_interval(parameters, losses, at, ladder.sigma),
        "measured": None,
    }


def _describe_prediction(ladder: Ladder, result: dict[str, Any]) -> str:
    low, high = result["interval"]
    return (
        f"depth {ladder.predict}: predicted held-out loss {result['predicted']:.4f}, from {low:.4f} to {high:.4f} "
        f"(95%, each loss known to {ladder.sigma} nats)"
    )


def describe(ladder: Ladder, result: dict[str, Any]) -> str:
    """A table in Markdown, the law and the prediction."""
    lines = ["| depth | parameters | row slots | held-out loss | by the law |", "|---|---|---|---|---|"]
    law = SizeLaw(**{name: result[f"law_{name}"] for name in ("floor", "scale", "exponent", "reference")})
    for depth, loss in zip((*ladder.depths, ladder.predict), (*result["losses"], result["measured"])):
        size, shown = ladder.size(depth), "" if loss is None else f"{loss:.4f}"
        name = f"**{depth}**" if depth == ladder.predict else f"{depth}"
        lines.append(f"| {name} | {size.parameters:,} | {size.tokens:,.0f} | {shown} | {law(size.parameters):.4f} |")
    lines += ["", result["law"], _describe_prediction(ladder, result)]
    if result["measured"] is not None:
        lines.append(
            f"measured {result['measured']:.4f}, {result['measured'] - result['predicted']:+.4f} of the prediction"
        )
    return "\n".join(lines)


def draw(ladder: Ladder, result: dict[str, Any]) -> str:
    """Losses over parameters (logarithmic) as SVG: dots are measured, the line is the law, the bar the interval."""
    law = SizeLaw(**{name: result[f"law_{name}"] for name in ("floor", "scale", "exponent", "reference")})
    sizes = [ladder.size(depth).parameters for depth in (*ladder.depths, ladder.predict)]
    low, high = min(sizes) * 0.9, max(sizes) * 1.1
    measured = [loss for loss in (*result["losses"], result["measured"]) if loss is not None]
    to_y = build_axis([*measured, *result["interval"], law(low), law(high)], 340, 40)

    def place(parameters: float, loss: float) -> tuple[float, float]:
        return 70 + 640 * math.log(parameters / low) / math.log(high / low), to_y(loss)

    line = [place(p, law(p)) for p in np.geomspace(low, high, 60)]
    x, first = place(sizes[-1], result["interval"][0])
    _, last = place(sizes[-1], result["interval"][1])
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="760" height="400" font-family="sans-serif" font-size="11">',
        '<rect width="760" height="400" fill="white"/>',
        '<text x="380" y="20" font-size="14" text-anchor="middle">held-out loss, nats per masked token</text>',
        f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in line)}" fill="none" stroke="#999999"/>',
        f'<line x1="{x:.1f}" y1="{first:.1f}" x2="{x:.1f}" y2="{last:.1f}" stroke="#c06030" stroke-width="3"/>',
    ]
    for height, value in to_y.ticks():
        parts.append(f'<text x="60" y="{height + 4:.1f}" text-anchor="end">{value}</text>')
    for depth, size, loss in zip((*ladder.depths, ladder.predict), sizes, (*result["losses"], result["measured"])):
        at, height = place(size, law(size) if loss is None else loss)
        if loss is not None:
            parts.append(
                f'<circle cx="{at:.1f}" cy="{height:.1f}" r="4" fill="#4878a8"><title>{loss:.4f}</title></circle>'
            )
        parts.append(f'<text x="{at:.1f}" y="370" text-anchor="middle">depth {depth}, {size / 1e6:.1f} M</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
