"""The plan of an experiment: which runs of which config are compared. Read and checked without torch.

A plan is a YAML file:

    config: small.yaml                      # beside the plan
    seeds_at_best: 2
    runs:
      adamw: {overrides: [optimizer.name=adamw], learning_rates: [1e-3, 2e-3, 4e-3]}
      muonclip: {overrides: [optimizer.name=muonclip], learning_rates: [2e-3, 4e-3, 1e-2]}

Each entry of `runs` is trained once with seed 0 at each of its learning rates (without any: at the config's own), then
with seeds 1 to `seeds_at_best` at the rate with the lowest held-out loss. Runs of one seed read the same rows in the
same order.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from neobert.config.load import ConfigError, load_config, split_arguments
from neobert.config.schema import Config
from neobert.config.shipped import find_file
from neobert.config.source import Leaf, Tree, YamlError, parse_yaml, read_yaml_text
from neobert.errors import UserError


class PlanError(UserError, ValueError):
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
class PlannedRun:
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


def use_local(data: Path, tokenizer: Path | None) -> list[str]:
    """Overrides that name the data, and a tokenizer folder, of this machine."""
    own = [] if tokenizer is None else ["tokenizer.name=null", f"tokenizer.path={tokenizer.absolute()}"]
    return [f"dataset.path={data.absolute()}", *own]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workspace:
    """Where the runs of a plan are written, and on which data they are made."""

    output: Path
    data: Path
    overrides: tuple[str, ...]
    """Laid over every config."""

    keep_weights: bool = False

    def run_dir(self, job: PlannedRun) -> Path:
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
        config=find_file(path).parent / config.text,
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


def grid(variant: Variant) -> list[PlannedRun]:
    """The runs that choose a learning rate."""
    rates: tuple[str | None, ...] = variant.learning_rates or (None,)
    return [PlannedRun(variant=variant, learning_rate=rate, seed=0) for rate in rates]


def build_job_config(plan: Plan, job: PlannedRun, workspace: Workspace) -> Config:
    """The config of a run. Raises ConfigError."""
    last = [f"trainer.output_dir={workspace.run_dir(job)}", "trainer.resume_from_checkpoint=latest"]
    return load_config(plan.config, [*workspace.overrides, *job.overrides, *last])


def check_plan(plan: Plan, workspace: Workspace) -> None:
    """Builds every config of the plan. Raises PlanError with everything that is wrong in any of them."""
    explicit = {key for key, _ in split_arguments(workspace.overrides)[0]}
    found = []
    for variant in plan.variants:
        for job in grid(variant):
            used = {key for key, _ in split_arguments([*job.overrides, "trainer.output_dir=-"])[0]}
            found += [f"{job.name}: {key} is set by the plan; leave it out" for key in sorted(explicit & used)]
            try:
                build_job_config(plan, job, workspace)
            except ConfigError as error:
                found += [f"{job.name}: {text}" for text in error.errors]
    if found:
        raise PlanError("\n  - ".join([f"{len(found)} error(s) in the plan {plan.name}:", *found]))


def choose_variants(plan: Plan, names: str | None) -> Plan:
    """The plan with the entries of `--only` alone. Raises PlanError."""
    if names is None:
        return plan
    requested = names.split(",")
    known = [variant.name for variant in plan.variants]
    unknown = [name for name in requested if name not in known]
    if unknown:
        raise PlanError(f"--only: {unknown[0]!r} is not in the plan; it has {', '.join(known)}")
    return dataclasses.replace(plan, variants=tuple(v for v in plan.variants if v.name in requested))
