"""An experiment: one config, varied, trained again and again on the same tokens, scored with the same masks.

A plan is a YAML file:

    config: small.yaml                      # beside the plan
    seeds_at_best: 2
    runs:
      adamw: {overrides: [optimizer.name=adamw], learning_rates: [1e-3, 2e-3, 4e-3]}
      muonclip: {overrides: [optimizer.name=muonclip], learning_rates: [2e-3, 4e-3, 1e-2]}

Each entry of `runs` is trained once with seed 0 at each of its learning rates (without any: at the config's own), then
with seeds 1 to `seeds_at_best` at the rate with the lowest held-out loss. Runs of one seed read the same rows in the
same order.

All configs are checked before the first run. A finished run leaves `score.json` in its folder and is not made again; a
run that was killed goes on from its newest checkpoint. The table and the picture are made from what is finished.
"""

import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neobert.benchmark.experiment_report import Outcome, best_outcomes, describe, draw
from neobert.benchmark.trial import (
    HELD_OUT,
    Stopped,
    build_parser,
    check_data,
    describe_machine,
    parse_arguments,
    read_speed,
    score,
    settle_precision,
    train,
)
from neobert.config.load import ConfigError, load_config, split_arguments, without_secrets
from neobert.config.schema import Config
from neobert.config.source import Leaf, Tree, YamlError, parse_yaml, read_yaml_text
from neobert.data.errors import DataError
from neobert.train.exit_codes import EXIT_CODES
from neobert.train.runtime import StartupError

SCORE = "score.json"


class PlanError(ValueError):
    """A plan that cannot be carried out; the message names the file, the key and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One entry of `runs`."""

    name: str
    overrides: tuple[str, ...]
    learning_rates: tuple[str, ...]
    """As written; empty: the config's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is compared."""

    name: str
    config: Path
    seeds_at_best: int
    variants: tuple[Variant, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run of a plan."""

    variant: Variant
    learning_rate: str | None
    seed: int

    @property
    def name(self) -> str:
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate}"
        return f"{self.variant.name}{rate}-seed{self.seed}"

    @property
    def overrides(self) -> list[str]:
        rate = [] if self.learning_rate is None else [f"optimizer.lr={self.learning_rate}"]
        return [*self.variant.overrides, *rate, f"seed={self.seed}"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where and on what the runs of a plan are made."""

    output: Path
    data: Path
    overrides: tuple[str, ...]
    """Laid over every config."""

    keep_weights: bool = False

    def run_dir(self, job: Job) -> Path:
        return self.output / job.name


def load_plan(path: Path) -> Plan:
    """The plan in a file. Raises PlanError."""
    try:
        tree = parse_yaml(read_yaml_text(path, "the plan"))
    except YamlError as error:
        raise PlanError(f"{path}: {error}") from error
    _check_keys(path, "the plan", tree, {"config", "runs", "seeds_at_best"})
    config, runs, seeds = tree.get("config"), tree.get("runs"), tree.get("seeds_at_best", Leaf("0"))
    if not isinstance(config, Leaf):
        raise PlanError(f"{path}: config: name the config that is varied, beside the plan")
    if not isinstance(seeds, Leaf) or not seeds.text.isdecimal():
        raise PlanError(f"{path}: seeds_at_best: write how many further seeds the best learning rate gets, 0 or more")
    if not isinstance(runs, dict) or not runs:
        raise PlanError(f"{path}: runs: write at least one, as `name: {{overrides: [section.key=value]}}`")
    return Plan(
        name=path.stem,
        config=path.parent / config.text,
        seeds_at_best=int(seeds.text),
        variants=tuple(_parse_variant(path, name, entry) for name, entry in runs.items()),
    )


def _parse_variant(path: Path, name: str, entry: Tree) -> Variant:
    where = f"{path}: runs.{name}"
    if not re.fullmatch(r"[\w.]+", name):
        raise PlanError(f"{where}: the name becomes part of a folder's; use letters, digits, _ and .")
    if isinstance(entry, Leaf) and entry.is_null:
        entry = {}
    if not isinstance(entry, dict):
        raise PlanError(f"{where}: expected `overrides` and `learning_rates`, got a value")
    _check_keys(path, f"runs.{name}", entry, {"overrides", "learning_rates"})
    texts = {}
    for key in ("overrides", "learning_rates"):
        items = entry.get(key, [])
        if not isinstance(items, list) or not all(isinstance(item, Leaf) for item in items):
            raise PlanError(f"{where}.{key}: write a list, such as {'[1e-3, 2e-3]' if key[0] == 'l' else '[a.b=c]'}")
        texts[key] = tuple(item.text for item in items)
    return Variant(name=name, **texts)


def _check_keys(path: Path, where: str, tree: dict[str, Tree], known: set[str]) -> None:
    unknown = sorted(set(tree) - known)
    if unknown:
        raise PlanError(f"{path}: {where} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")


def grid(variant: Variant) -> list[Job]:
    """The runs that choose a learning rate."""
    rates: tuple[str | None, ...] = variant.learning_rates or (None,)
    return [Job(variant=variant, learning_rate=rate, seed=0) for rate in rates]


def build_job_config(plan: Plan, job: Job, place: Place) -> Config:
    """The config of a run. Raises ConfigError."""
    last = [f"trainer.output_dir={place.run_dir(job)}", "trainer.resume_from_checkpoint=latest"]
    return load_config(plan.config, [*place.overrides, *job.overrides, *last])


def check_plan(plan: Plan, place: Place) -> None:
    """Builds every config of the plan. Raises PlanError with everything that is wrong in any of them."""
    given = {key for key, _ in split_arguments(place.overrides)[0]}
    found = []
    for variant in plan.variants:
        for job in grid(variant):
            taken = {key for key, _ in split_arguments([*job.overrides, "trainer.output_dir=-"])[0]}
            found += [f"{job.name}: {key} is set by the plan; leave it out" for key in sorted(given & taken)]
            try:
                build_job_config(plan, job, place)
            except ConfigError as error:
                found += [f"{job.name}: {text}" for text in error.errors]
    if found:
        raise PlanError("\n  - ".join([f"{len(found)} error(s) in the plan {plan.name}:", *found]))


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
    saved = load_config(run / "config.yaml")
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


def main(argv: Sequence[str], description: str | None = None) -> int:
    """The command line of `scripts/experiments/compare.py`: progress on the error output, the table at the end."""
    parser = build_parser(description, file_help="plan, such as configs/experiments/optimizers.yaml")
    parser.add_argument("--only", metavar="NAMES", help="entries of the plan to run now, separated by commas")
    parser.add_argument("--check", action="store_true", help="check all configs, list the runs, train nothing")
    parser.add_argument("--keep-weights", action="store_true", help="keep the checkpoints of runs that were scored")
    options, overrides = parse_arguments(parser, argv)
    place = Place(
        output=options.output, data=options.data, overrides=tuple(overrides), keep_weights=options.keep_weights
    )
    try:
        plan = load_plan(options.file)
        chosen = _choose(plan, options.only)
        check_plan(chosen, place)
        check_data(place.data)
        if options.check:
            print("\n".join(job.name for variant in chosen.variants for job in grid(variant)))
            return 0
        config = build_job_config(chosen, grid(chosen.variants[0])[0], place)
        settled = settle_precision(config, sorted(place.output.glob("*/config.yaml")))
        place = dataclasses.replace(place, overrides=(*place.overrides, *settled))
        for job, outcome in run_plan(chosen, place):
            print(f"{job.name}: {outcome.describe()}", file=sys.stderr, flush=True)
            table = write_results(plan, place, finished(plan, place))
    except (PlanError, ConfigError, StartupError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"stopped ({stopped.reason}); type the same command to go on", file=sys.stderr)
        return EXIT_CODES[stopped.reason]
    print(table)
    return 0


def _choose(plan: Plan, names: str | None) -> Plan:
    if names is None:
        return plan
    wanted = names.split(",")
    known = [variant.name for variant in plan.variants]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise PlanError(f"--only: {unknown[0]!r} is not in the plan; it has {', '.join(known)}")
    return dataclasses.replace(plan, variants=tuple(v for v in plan.variants if v.name in wanted))
