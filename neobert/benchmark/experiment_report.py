"""What came out of an experiment: which learning rate was best, a table, and a picture.

The best learning rate of an entry is the one with the lowest held-out loss among the runs with seed 0. The others with
that rate were not looked at when it was chosen, so the range over seeds says how much of a difference is chance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import mean, median

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _BOTTOM = 760, 190, 70, 44, 20, 44


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One finished run."""

    variant: str
    learning_rate: str | None
    seed: int
    loss: float | None
    """Held-out, in nats per masked token; None where the numbers went bad."""

    accuracy: float | None
    num_steps: int
    num_tokens: int
    training_seconds: float
    tokens_per_second: float

    def describe(self) -> str:
        """The run in a line."""
        loss = "stopped, its numbers went bad" if self.loss is None else f"held-out loss {self.loss:.4f}"
        return f"{loss}, {self.num_tokens:,} tokens in {self.training_seconds:,.0f} s"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The runs of one entry at one learning rate."""

    variant: str
    learning_rate: str | None
    outcomes: tuple[Outcome, ...]
    best: bool

    @property
    def losses(self) -> list[float]:
        return [outcome.loss for outcome in self.outcomes if outcome.loss is not None]

    @property
    def label(self) -> str:
        return self.variant if self.learning_rate is None else f"{self.variant} {self.learning_rate}"


def best_outcomes(outcomes: Sequence[Outcome]) -> dict[str, Outcome]:
    """For each entry the run with seed 0 that has the lowest loss; entries without a loss are left out."""
    best: dict[str, Outcome] = {}
    for outcome in outcomes:
        if outcome.seed != 0 or outcome.loss is None:
            continue
        so_far = best.get(outcome.variant)
        if so_far is None or so_far.loss is None or outcome.loss < so_far.loss:
            best[outcome.variant] = outcome
    return best


def build_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """The runs by entry and learning rate, in the order they come in."""
    best = best_outcomes(outcomes)
    groups: dict[tuple[str, str | None], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.variant, outcome.learning_rate), []).append(outcome)
    return [
        Row(
            variant=variant,
            learning_rate=rate,
            outcomes=tuple(group),
            best=variant in best and best[variant].learning_rate == rate,
        )
        for (variant, rate), group in groups.items()
    ]


def describe(outcomes: Sequence[Outcome]) -> str:
    """A table in Markdown, the best learning rate of each entry in bold, and what to mind about it."""
    rows = build_rows(outcomes)
    lines = [
        "| | learning rate | held-out loss, mean | lowest and highest | seeds | accuracy | tokens | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
        *(_describe_row(row) for row in rows),
    ]
    notes = [note for variant in dict.fromkeys(row.variant for row in rows) for note in _edge(rows, variant)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _describe_row(row: Row) -> str:
    losses = row.losses
    name, rate = row.variant, row.learning_rate or "of the config"
    if row.best:
        name, rate = f"**{name}**", f"**{rate}**"
    if not losses:
        return f"| {name} | {rate} | numbers went bad | | {len(row.outcomes)} | | | |"
    bad = len(row.outcomes) - len(losses)
    seeds = f"{len(row.outcomes)}" + (f" ({bad} went bad)" if bad else "")
    spread = f"{min(losses):.4f} {max(losses):.4f}" if len(losses) > 1 else ""
    accuracy = mean(outcome.accuracy for outcome in row.outcomes if outcome.accuracy is not None)
    speed = median(outcome.tokens_per_second for outcome in row.outcomes)
    tokens = median(outcome.num_tokens for outcome in row.outcomes)
    return (
        f"| {name} | {rate} | {mean(losses):.4f} | {spread} | {seeds} | {accuracy:.2%} | {tokens:,.0f} | {speed:,.0f} |"
    )


def _edge(rows: Sequence[Row], variant: str) -> list[str]:
    """A sentence when the best rate is the lowest or the highest that was tried."""
    tried = sorted((row for row in rows if row.variant == variant and row.learning_rate), key=_rate)
    if len(tried) < 2:
        return []
    ends = {"lowest": tried[0], "highest": tried[-1]}
    return [
        f"{variant}: the best learning rate, {row.learning_rate}, is the {word} one tried; a better one may lie beyond."
        for word, row in ends.items()
        if row.best
    ]


def _rate(row: Row) -> float:
    return float(row.learning_rate or "nan")


def draw(outcomes: Sequence[Outcome], title: str) -> str:
    """One line of dots for each entry and learning rate, as SVG: a dot is a run, filled at the best rate."""
    rows = build_rows(outcomes)
    losses = [loss for row in rows for loss in row.losses] or [0.0]
    low, high = min(losses), max(losses)
    margin = 0.05 * (high - low) or 0.05
    low, high = low - margin, high + margin
    base = _TOP + _ROW * len(rows)

    def place(loss: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (loss - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{base + _BOTTOM}" '
        f'font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{base + _BOTTOM}" fill="white"/>',
        f'<text x="{_WIDTH / 2}" y="20" font-size="14" text-anchor="middle">{escape(title)}</text>',
    ]
    for number in range(6):
        value = low + (high - low) * number / 5
        x = place(value)
        parts += [
            f'<line x1="{x:.1f}" y1="{_TOP - 8}" x2="{x:.1f}" y2="{base}" stroke="#dddddd"/>',
            f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{value:.2f}</text>',
        ]
    for number, row in enumerate(rows):
        parts += _draw_row(row, _TOP + _ROW * (number + 0.5), place)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _draw_row(row: Row, y: float, place: Callable[[float], float]) -> list[str]:
    weight = ' font-weight="bold"' if row.best else ""
    parts = [f'<text x="{_LEFT - 10}" y="{y + 4:.1f}" text-anchor="end"{weight}>{escape(row.label)}</text>']
    fill = "#4878a8" if row.best else "white"
    for outcome in row.outcomes:
        if outcome.loss is not None:
            parts.append(
                f'<circle cx="{place(outcome.loss):.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="#4878a8">'
                f"<title>seed {outcome.seed}: {outcome.loss:.4f}</title></circle>"
            )
    end = f"{mean(row.losses):.3f}" if row.losses else "bad numbers"
    return [*parts, f'<text x="{_WIDTH - _RIGHT + 10}" y="{y + 4:.1f}"{weight}>{end}</text>']
