"""An experiment: one config, varied, trained again and again on the same tokens, scored with the same masks.

A plan is a YAML file (`experiment_plan.py`).
All configs are checked before the first run. A finished run leaves `score.json` in its folder and is not made again; a
run that was killed goes on from its newest checkpoint. The table and the picture are made from what is finished.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from neobert import cli
from neobert.benchmark.experiment_plan import Job, Place, Plan, PlanError, build_job_config, grid
from neobert.benchmark.experiment_report import Outcome, best_outcomes, describe, draw
from neobert.benchmark.trial import (
    HELD_OUT,
    Stopped,
    describe_machine,
    read_speed,
    score,
    settle_precision,
    train,
)
from neobert.config.load import load_saved_config, without_secrets
from neobert.config.schema import Config

SCORE = "score.json"


def run_plan(plan: Plan, place: Place) -> Iterator[tuple[Job, Outcome]]:
    """Makes the runs of a plan, or finds them made, one after another.

    Raises:
        Stopped: a run was interrupted; the next start goes on with it.
        PlanError: a finished run in the folder was made with another config.
    """
    for variant in plan.variants:
        outcomes = []
        for job in grid(variant):
            outcomes.append(run_job(plan, job, place))
            yield job, outcomes[-1]
        best = best_outcomes(outcomes).get(variant.name)
        if best is None:
            continue
        for seed in range(1, plan.seeds_at_best + 1):
            job = Job(variant=variant, learning_rate=best.learning_rate, seed=seed)
            yield job, run_job(plan, job, place)


def finished(plan: Plan, place: Place) -> list[Outcome]:
    """All runs of the plan that are finished, also those of other starts, in the order of the plan."""
    found: list[Outcome] = []
    for variant in plan.variants:
        for first in grid(variant):
            for seed in range(plan.seeds_at_best + 1):
                job = dataclasses.replace(first, seed=seed)
                if (place.run_dir(job) / SCORE).is_file():
                    found.append(read_outcome(job, place.run_dir(job), build_job_config(plan, job, place)))
    return found


def run_job(plan: Plan, job: Job, place: Place) -> Outcome:
    """One run, trained and scored. A run whose numbers went bad has no loss."""
    config, run = build_job_config(plan, job, place), place.run_dir(job)
    if (run / SCORE).is_file():
        outcome = read_outcome(job, run, config)
    else:
        outcome = _make(job, config, run, place.data)
        temporary = run / f".{SCORE}.tmp"
        temporary.write_text(json.dumps(dataclasses.asdict(outcome), indent=1) + "\n")
        os.replace(temporary, run / SCORE)
    if not place.keep_weights:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return outcome


def _make(job: Job, config: Config, run: Path, data: Path) -> Outcome:
    found = None
    try:
        train(config)
        found = score(run, data, device="cpu" if config.trainer.use_cpu else "auto")
    except Stopped as stopped:
        if stopped.reason != "numbers":
            raise
    return Outcome(
        variant=job.variant.name,
        learning_rate=job.learning_rate,
        seed=job.seed,
        loss=None if found is None else found.loss,
        accuracy=None if found is None else found.accuracy,
        **dataclasses.asdict(read_speed(run)),
    )


def read_outcome(job: Job, run: Path, config: Config) -> Outcome:
    """What a finished run left behind. Raises PlanError when it was made with other settings."""
    # The file is read anew, not compared as text: keys that came later have their defaults in it.
    saved = load_saved_config(run / "config.yaml")
    if _what_is_made(saved) != _what_is_made(_with_choices_of(saved, without_secrets(config))):
        raise PlanError(f"{run} holds a finished run with other settings than {job.name}; give another --output")
    return Outcome(**json.loads((run / SCORE).read_text()))


def _with_choices_of(saved: Config, config: Config) -> Config:
    """The config with what the saved run chose in the place of `auto`."""
    names = ("mixed_precision", "per_device_train_batch_size")
    chosen = {name: getattr(saved.trainer, name) for name in names if getattr(config.trainer, name) == "auto"}
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, **chosen))


def _what_is_made(config: Config) -> Config:
    """The config without what may differ between two starts of one run."""
    return dataclasses.replace(
        config, trainer=dataclasses.replace(config.trainer, output_dir="-", resume_from_checkpoint=None)
    )


def write_results(plan: Plan, place: Place, outcomes: Sequence[Outcome]) -> str:
    """`results.json`, `results.md` and `results.svg` in the plan's folder; the table."""
    results: dict[str, Any] = {
        "plan": plan.name,
        "settings": place.overrides,
        **describe_machine(),
        "held_out": dataclasses.asdict(HELD_OUT),
        "best": {name: best.learning_rate for name, best in best_outcomes(outcomes).items()},
        "runs": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    table = describe(outcomes)
    (place.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (place.output / "results.md").write_text(table + "\n")
    (place.output / "results.svg").write_text(draw(outcomes, f"{plan.name}: held-out loss, nats per masked token"))
    return table


def compare(plan: Plan, chosen: Plan, place: Place) -> str:
    """Makes the runs of `chosen`, a part of `plan`; the table over all runs of the plan. Progress on the error output.

    Raises:
        Stopped: a run was interrupted; the next start goes on with it.
    """
    config = build_job_config(chosen, grid(chosen.variants[0])[0], place)
    settled = settle_precision(config, sorted(place.output.glob("*/config.yaml")))
    place = dataclasses.replace(place, overrides=(*place.overrides, *settled))
    for job, outcome in run_plan(chosen, place):
        cli.say(f"{job.name}: {outcome.describe()}")
        table = write_results(plan, place, finished(plan, place))
    return table
