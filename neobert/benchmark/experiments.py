"""An experiment: one config, varied, trained again and again on the same tokens, scored with the same masks.

A plan is a YAML file (`experiment_plan.py`). All configs are checked before the first run. A finished run leaves
`score.json` in its folder and is not made again; a run that was killed continues from its newest checkpoint. The table
and the picture are made from what is finished.

What came out of an experiment: which learning rate was best, a table, and a picture.

The best learning rate of an entry is the one with the lowest held-out loss among the runs with seed 0. The others with
that rate were not looked at when it was chosen, so the range over seeds says how much of a difference is chance.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean, median
from typing import Any

from neobert import cli
from neobert.benchmark.experiment_plan import Plan, PlanError, PlannedRun, Workspace, build_job_config, grid
from neobert.benchmark.loss_axis import build_axis
from neobert.benchmark.trial import (
    HELD_OUT,
    Stopped,
    describe_machine,
    fix_precision,
    read_speed,
    score,
    train,
)
from neobert.config.load import load_saved_config, without_secrets
from neobert.config.schema import Config
from neobert.disk import write_text

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _BOTTOM = 760, 190, 70, 44, 20, 44


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
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
class ResultRow:
    """The runs of one entry at one learning rate."""

    variant: str
    learning_rate: str | None
    outcomes: tuple[TrialResult, ...]
    best: bool

    @property
    def losses(self) -> list[float]:
        return [outcome.loss for outcome in self.outcomes if outcome.loss is not None]

    @property
    def label(self) -> str:
        return self.variant if self.learning_rate is None else f"{self.variant} {self.learning_rate}"


def best_outcomes(outcomes: Sequence[TrialResult]) -> dict[str, TrialResult]:
    """For each entry the run with seed 0 that has the lowest loss; entries without a loss are left out."""
    best: dict[str, TrialResult] = {}
    for outcome in outcomes:
        if outcome.seed != 0 or outcome.loss is None:
            continue
        so_far = best.get(outcome.variant)
        if so_far is None or so_far.loss is None or outcome.loss < so_far.loss:
            best[outcome.variant] = outcome
    return best


def build_rows(outcomes: Sequence[TrialResult]) -> list[ResultRow]:
    """The runs by entry and learning rate, in the order they come in."""
    best = best_outcomes(outcomes)
    groups: dict[tuple[str, str | None], list[TrialResult]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.variant, outcome.learning_rate), []).append(outcome)
    return [
        ResultRow(
            variant=variant,
            learning_rate=rate,
            outcomes=tuple(group),
            best=variant in best and best[variant].learning_rate == rate,
        )
        for (variant, rate), group in groups.items()
    ]


def describe(outcomes: Sequence[TrialResult]) -> str:
    """A table in Markdown, the best learning rate of each entry in bold, and what to mind about it."""
    rows = build_rows(outcomes)
    lines = [
        "| | learning rate | held-out loss, mean | lowest and highest | seeds | accuracy | tokens | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
        *(_describe_row(row) for row in rows),
    ]
    notes = [note for variant in dict.fromkeys(row.variant for row in rows) for note in _edge(rows, variant)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _describe_row(row: ResultRow) -> str:
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


def _edge(rows: Sequence[ResultRow], variant: str) -> list[str]:
    """A sentence when the best rate is the lowest or the highest that was tried."""
    tried = sorted((row for row in rows if row.variant == variant and row.learning_rate), key=_rate)
    if len(tried) < 2:
        return []
    ends = {"lowest": tried[0], "highest": tried[-1]}
    return [
        f"{variant}: the best learning rate, {row.learning_rate}, is the {end} one tried; a better one may lie beyond."
        for end, row in ends.items()
        if row.best
    ]


def _rate(row: ResultRow) -> float:
    return float(row.learning_rate or "nan")


def draw(outcomes: Sequence[TrialResult], title: str) -> str:
    """One line of dots for each entry and learning rate, as SVG: a dot is a run, filled at the best rate."""
    rows = build_rows(outcomes)
    base = _TOP + _ROW * len(rows)
    to_x = build_axis([loss for row in rows for loss in row.losses] or [0.0], _LEFT, _WIDTH - _RIGHT)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{base + _BOTTOM}" '
        f'font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{base + _BOTTOM}" fill="white"/>',
        f'<text x="{_WIDTH / 2}" y="20" font-size="14" text-anchor="middle">{escape(title)}</text>',
    ]
    for x, value in to_x.ticks():
        parts += [
            f'<line x1="{x:.1f}" y1="{_TOP - 8}" x2="{x:.1f}" y2="{base}" stroke="#dddddd"/>',
            f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{value}</text>',
        ]
    for number, row in enumerate(rows):
        parts += _draw_row(row, _TOP + _ROW * (number + 0.5), to_x)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _draw_row(row: ResultRow, y: float, to_x: Callable[[float], float]) -> list[str]:
    weight = ' font-weight="bold"' if row.best else ""
    parts = [f'<text x="{_LEFT - 10}" y="{y + 4:.1f}" text-anchor="end"{weight}>{escape(row.label)}</text>']
    fill = "#4878a8" if row.best else "white"
    for outcome in row.outcomes:
        if outcome.loss is not None:
            parts.append(
                f'<circle cx="{to_x(outcome.loss):.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="#4878a8">'
                f"<title>seed {outcome.seed}: {outcome.loss:.4f}</title></circle>"
            )
    end = f"{mean(row.losses):.3f}" if row.losses else "bad numbers"
    return [*parts, f'<text x="{_WIDTH - _RIGHT + 10}" y="{y + 4:.1f}"{weight}>{end}</text>']


SCORE = "score.json"


def with_precision(plan: Plan, workspace: Workspace) -> Workspace:
    """The workspace with one precision instead of `auto` for all runs: that of those which are made already."""
    config = build_job_config(plan, grid(plan.variants[0])[0], workspace)
    precision = fix_precision(config, sorted(workspace.output.glob("*/config.yaml")))
    return dataclasses.replace(workspace, overrides=(*workspace.overrides, *precision))


def run_plan(plan: Plan, workspace: Workspace) -> Iterator[tuple[PlannedRun, TrialResult]]:
    """Makes the runs of a plan, or finds them made, one after another.

    Raises:
        Stopped: a run was interrupted; the next start continues with it.
        PlanError: a finished run in the folder was made with another config.
    """
    for variant in plan.variants:
        outcomes = []
        for job in grid(variant):
            outcomes.append(run_job(plan, job, workspace))
            yield job, outcomes[-1]
        best = best_outcomes(outcomes).get(variant.name)
        if best is None:
            continue
        for seed in range(1, plan.seeds_at_best + 1):
            job = PlannedRun(variant=variant, learning_rate=best.learning_rate, seed=seed)
            yield job, run_job(plan, job, workspace)


def finished(plan: Plan, workspace: Workspace) -> list[TrialResult]:
    """All runs of the plan that are finished, also those of other starts, in the order of the plan."""
    found: list[TrialResult] = []
    for variant in plan.variants:
        for first in grid(variant):
            for seed in range(plan.seeds_at_best + 1):
                job = dataclasses.replace(first, seed=seed)
                if (workspace.run_dir(job) / SCORE).is_file():
                    found.append(read_outcome(job, workspace.run_dir(job), build_job_config(plan, job, workspace)))
    return found


def run_job(plan: Plan, job: PlannedRun, workspace: Workspace) -> TrialResult:
    """One run, trained and scored. A run whose numbers went bad has no loss."""
    config, run = build_job_config(plan, job, workspace), workspace.run_dir(job)
    if (run / SCORE).is_file():
        outcome = read_outcome(job, run, config)
    else:
        outcome = _make(job, config, run, workspace.data)
        write_text(run / SCORE, json.dumps(dataclasses.asdict(outcome), indent=1) + "\n")
    if not workspace.keep_weights:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return outcome


def _make(job: PlannedRun, config: Config, run: Path, data: Path) -> TrialResult:
    found = None
    try:
        train(config)
        found = score(run, data, device="cpu" if config.trainer.means_cpu else "auto")
    except Stopped as stopped:
        if stopped.outcome != "numbers":
            raise
    return TrialResult(
        variant=job.variant.name,
        learning_rate=job.learning_rate,
        seed=job.seed,
        loss=None if found is None else found.loss,
        accuracy=None if found is None else found.accuracy,
        **dataclasses.asdict(read_speed(run)),
    )


def read_outcome(job: PlannedRun, run: Path, config: Config) -> TrialResult:
    """What a finished run left behind. Raises PlanError when it was made with other settings."""
    # The file is read again, not compared as text: keys that came later have their defaults in it.
    saved = load_saved_config(run / "config.yaml")
    if _what_is_made(saved) != _what_is_made(_with_choices_of(saved, without_secrets(config))):
        raise PlanError(f"{run} holds a finished run with other settings than {job.name}; give another --output")
    return TrialResult(**json.loads((run / SCORE).read_text()))


def _with_choices_of(saved: Config, config: Config) -> Config:
    """The config with what the saved run chose for `auto`."""
    names = ("mixed_precision", "per_device_train_batch_size")
    chosen = {name: getattr(saved.trainer, name) for name in names if getattr(config.trainer, name) == "auto"}
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, **chosen))


def _what_is_made(config: Config) -> Config:
    """The config without what may differ between two starts of one run."""
    return dataclasses.replace(
        config, trainer=dataclasses.replace(config.trainer, output_dir="-", resume_from_checkpoint=None)
    )


def write_results(plan: Plan, workspace: Workspace, outcomes: Sequence[TrialResult]) -> str:
    """`results.json`, `results.md` and `results.svg` in the plan's folder; the table."""
    results: dict[str, Any] = {
        "plan": plan.name,
        "settings": workspace.overrides,
        **describe_machine(),
        "held_out": dataclasses.asdict(HELD_OUT),
        "best": {name: best.learning_rate for name, best in best_outcomes(outcomes).items()},
        "runs": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    table = describe(outcomes)
    (workspace.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (workspace.output / "results.md").write_text(table + "\n")
    (workspace.output / "results.svg").write_text(draw(outcomes, f"{plan.name}: held-out loss, nats per masked token"))
    return table


def compare(plan: Plan, chosen: Plan, workspace: Workspace) -> str:
    """Makes the runs of `chosen`, a part of `plan`; the table over all runs of the plan. Progress on the error output.

    Raises:
        Stopped: a run was interrupted; the next start continues with it.
    """
    workspace = with_precision(chosen, workspace)
    for job, outcome in run_plan(chosen, workspace):
        cli.say(f"{job.name}: {outcome.describe()}")
        table = write_results(plan, workspace, finished(plan, workspace))
    return table
