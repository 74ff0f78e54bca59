"""Curves of a run over its steps, tokens and seconds, thinned to what a screen can show."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from neobert.train.report.log_reader import Line, RunLog, as_number

MOST_POINTS = 1200
"""Of a curve: more than a chart has pixels."""

Numbers = NDArray[np.float64]

Unit = Literal["number", "fraction", "bytes"]

_OF_INTERVALS = {"kind", "step", "first_step", "loss", "skipped", "tokens_per_second", "mfu", "data_wait"}
_OF_INTERVALS |= {"packing_fill", "peak_memory_bytes", "weight_norm", "accuracy", "tokens", "source_tokens", "seconds"}
_OF_INTERVALS |= {"partial", "profiled_steps"}
"""Fields of a `log` line that have a chart of their own, or none; the others are statistics of the run."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Points in the order of their steps, `y` exactly as in the log. All lists are equally long."""

    label: str
    step: list[int]
    tokens: list[int]
    """Real tokens up to the step."""

    seconds: list[float] | None
    """Of training up to the step, without evaluations and saves; None where no interval was logged."""

    y: list[float]
    num_points: int
    """Before thinning."""

    num_missing: int
    """Values that are not finite, which cannot be drawn."""

    faint: bool = False
    """Drawn thin, below the others: single steps, beside a mean."""


@dataclass(slots=True)
class Chart:
    title: str
    unit: Unit = "number"
    curves: list[Curve] = field(default_factory=list)

    def as_data(self) -> dict[str, Any]:
        """For the viewer; the lists are not copied."""
        curves = [{f.name: getattr(curve, f.name) for f in fields(curve)} for curve in self.curves]
        return {"title": self.title, "unit": self.unit, "curves": curves}


def thin(values: Numbers, most: int = MOST_POINTS) -> NDArray[np.intp]:
    """Indices of at most `most` of the values, in order: the first, the last, and the lowest and the highest of each
    of equally long buckets, so that no spike is lost or averaged away."""
    if len(values) <= most:
        return np.arange(len(values), dtype=np.intp)
    edges: list[int] = np.linspace(0, len(values), (most - 2) // 2 + 1).astype(int).tolist()
    kept = [0, len(values) - 1]
    for start, end in pairwise(edges):
        bucket = values[start:end]
        kept += [start + int(bucket.argmin()), start + int(bucket.argmax())]
    return np.unique(np.array(kept, dtype=np.intp))


class Axes:
    """Where a step is in tokens and in seconds."""

    def __init__(self, log: RunLog) -> None:
        self._log = log

    @cached_property
    def _tokens(self) -> tuple[Numbers, Numbers]:
        steps, counts = _as_columns(self._log, "step", "num_tokens")
        sums, base = np.nan_to_num(counts).cumsum(), 0.0
        # The log of a run that continues another folder's checkpoint starts after step 1.
        for line in self._log.lines.get("log", ()):
            index, tokens = np.searchsorted(steps, line["step"]), as_number(line.get("tokens"))
            if tokens is not None and index < len(steps) and steps[index] == line["step"]:
                base = tokens - sums[index]
                break
        first = steps[:1] - 1
        return np.append(first, steps), np.append(np.zeros(len(first)), sums) + base

    @cached_property
    def _seconds(self) -> tuple[list[float], list[float]] | None:
        steps: list[float] = []
        sums: list[float] = []
        total, rate = 0.0, 0.0
        for line in self._log.lines.get("log", ()):
            seconds, first = as_number(line.get("seconds")), as_number(line.get("first_step"))
            if seconds is None or first is None:
                continue
            steps += [first - 1, line["step"]]
            sums += [total, total + seconds]
            total, rate = total + seconds, seconds / max(line["step"] - first + 1, 1)
        if not steps:
            return None
        if self._log.last_step > steps[-1]:  # At the speed of the last interval: what is not logged yet.
            sums.append(total + rate * (self._log.last_step - steps[-1]))
            steps.append(self._log.last_step)
        return steps, sums

    def tokens_at(self, steps: Sequence[int]) -> list[int]:
        known, sums = self._tokens
        return [round(x) for x in np.interp(steps, known, sums).tolist()] if len(known) else [0] * len(steps)

    def seconds_at(self, steps: Sequence[int]) -> list[float] | None:
        return None if self._seconds is None else np.interp(steps, *self._seconds).round(2).tolist()


def _as_columns(log: RunLog, *names: str) -> list[Numbers]:
    """Copies, since a column whose memory is in use could not grow."""
    return [np.array(log.steps[name]) for name in names]


class _Drawing:
    """Makes the curves of one run."""

    def __init__(self, log: RunLog) -> None:
        self.log, self.axes = log, Axes(log)

    def curve(self, label: str, steps: Numbers, y: Numbers, *, faint: bool = False) -> Iterator[Curve]:
        """The curve of values at steps, NaN where there is none; nothing without any value."""
        known = np.isfinite(y) & np.isfinite(steps)
        x, values = steps[known], y[known]
        if not len(x):
            return
        if (np.diff(x) <= 0).any():  # A step that is there twice has its last value.
            by_step = dict(sorted(dict(zip(x.tolist(), values.tolist())).items()))
            x, values = np.array([*by_step]), np.array([*by_step.values()])
        kept = thin(values)
        shown = x[kept].astype(np.int64).tolist()
        yield Curve(
            label=label,
            step=shown,
            tokens=self.axes.tokens_at(shown),
            seconds=self.axes.seconds_at(shown),
            y=values[kept].tolist(),
            num_points=len(x),
            num_missing=len(y) - int(known.sum()),
            faint=faint,
        )

    def steps(self, label: str, name: str, *, faint: bool = False) -> Iterator[Curve]:
        yield from self.curve(label, *_as_columns(self.log, "step", name), faint=faint)

    def points(self, label: str, points: Iterable[tuple[int, Any]]) -> Iterator[Curve]:
        """The curve of (step, value of a line); a line whose value is null has none."""
        found = [(step, as_number(y)) for step, y in points if y is not None]
        values = np.array([(step, np.nan if y is None else y) for step, y in found], dtype=np.float64).reshape(-1, 2)
        yield from self.curve(label, values[:, 0], values[:, 1])

    def of_kind(self, kind: str, label: str, name: str) -> Iterator[Curve]:
        yield from self.points(label, ((line["step"], line.get(name)) for line in self.log.lines.get(kind, ())))

    def intervals(self, label: str, name: str) -> Iterator[Curve]:
        yield from self.of_kind("log", label, name)


def build_charts(log: RunLog) -> list[Chart]:
    """The charts of a run that have something to show."""
    draw = _Drawing(log)
    charts = [
        Chart("Loss", "number", [*_losses(draw)]),
        Chart("Accuracy", "fraction", [*draw.intervals("train", "accuracy"), *_of_evaluations(draw, "accuracy")]),
        *_other_metrics(draw),
        Chart("Learning rate", "number", [*draw.steps("each step", "lr")]),
        Chart("Gradient norm", "number", [*draw.steps("each step, before clipping", "grad_norm")]),
        Chart("Tokens a second", "number", [*draw.intervals("training", "tokens_per_second")]),
        Chart(
            "MFU and data wait",
            "fraction",
            [*draw.intervals("MFU", "mfu"), *draw.intervals("data wait, of the time", "data_wait")],
        ),
        Chart("Peak memory", "bytes", [*draw.intervals("largest of all processes", "peak_memory_bytes")]),
        Chart("Packing fill", "fraction", [*draw.intervals("real tokens, of all slots", "packing_fill")]),
        Chart("Mask rate", "fraction", [*_mask_rate(draw)]),
        Chart("Tokens by source", "fraction", [*_sources(draw)]),
        *_probes(draw),
        Chart("Weight norm", "number", [*draw.intervals("all weights", "weight_norm")]),
        *_statistics(draw),
    ]
    return [chart for chart in charts if chart.curves]


def _losses(draw: _Drawing) -> Iterator[Curve]:
    yield from draw.steps("train, each step", "loss", faint=True)
    yield from draw.intervals("train, mean of the interval", "loss")
    yield from _of_evaluations(draw, "loss")


_EVALUATIONS = {"eval": "held-out", "eval_ema": "held-out, averaged weights"}
_PROBES = {"probe": "", "probe_ema": ", averaged weights"}


def _of_evaluations(draw: _Drawing, name: str) -> Iterator[Curve]:
    for kind, label in _EVALUATIONS.items():
        yield from draw.of_kind(kind, label, name)


def _other_metrics(draw: _Drawing) -> Iterator[Chart]:
    """Of evaluations: metrics of other objectives, by name, those of a set of pairs in one chart."""
    charts: dict[str, Chart] = {}
    for kind, suffix in _EVALUATIONS.items():
        lines = [_flatten(line) for line in draw.log.lines.get(kind, ())]
        names = dict.fromkeys(name for line in lines for name in line)
        for name in names:
            if name in ("kind", "step", "loss", "accuracy") or name.split("/")[-1].startswith("num_"):
                continue
            group, _, label = name.rpartition("/")
            title = f"Held-out: {group.removeprefix('sets/') or name}"
            points = ((line["step"], line.get(name)) for line in lines)
            charts.setdefault(title, Chart(title)).curves += draw.points(f"{label}, {suffix}", points)
    yield from charts.values()


def _flatten(line: Line, prefix: str = "") -> Line:
    """Mappings in a line as `outer/inner`."""
    found: Line = {}
    for name, value in line.items():
        found |= _flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _mask_rate(draw: _Drawing) -> Iterator[Curve]:
    steps, targets, tokens = _as_columns(draw.log, "step", "num_targets", "num_tokens")
    with np.errstate(divide="ignore", invalid="ignore"):
        yield from draw.curve("predicted tokens, of all", steps, targets / tokens)


def _sources(draw: _Drawing) -> Iterator[Curve]:
    lines = [line for line in draw.log.lines.get("log", ()) if isinstance(line.get("source_tokens"), dict)]
    for label in dict.fromkeys(name for line in lines for name in line["source_tokens"]):
        points = (
            (line["step"], line["source_tokens"].get(label, 0) / max(sum(line["source_tokens"].values()), 1))
            for line in lines
        )
        yield from draw.points(label, points)


def _probes(draw: _Drawing) -> Iterator[Chart]:
    charts: dict[str, Chart] = {}
    for kind, suffix in _PROBES.items():
        for part, prefix in (("sets", "Probe: "), ("losses", "Probe: loss by ")):
            lines = [(x["step"], x[part]) for x in draw.log.lines.get(kind, ()) if isinstance(x.get(part), dict)]
            for name in dict.fromkeys(name for _, found in lines for name in found):
                for metric in dict.fromkeys(m for _, found in lines for m in found.get(name, {})):
                    points = ((step, found.get(name, {}).get(metric)) for step, found in lines)
                    title = f"{prefix}{name.replace('_', ' ')}"
                    charts.setdefault(title, Chart(title)).curves += draw.points(f"{metric}{suffix}", points)
    yield from charts.values()


def _statistics(draw: _Drawing) -> Iterator[Chart]:
    """Of `log` lines: what `trainer.log_statistics` and the clipping of attention logits add."""
    names = dict.fromkeys(n for line in draw.log.lines.get("log", ()) for n in line if n not in _OF_INTERVALS)
    charts: dict[str, Chart] = {}
    for name in names:
        group, _, label = name.rpartition("/")
        title = (group or name).replace("_", " ").capitalize()
        title += " by kind of weight" if group.endswith("norm") else ""
        charts.setdefault(title, Chart(title)).curves += draw.intervals(label or name, name)
    yield from charts.values()
