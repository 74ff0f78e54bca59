"""One config with several seeds: a run for each, one after the other, and what they reached together."""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from neobert import cli
from neobert.config.schema import Config
from neobert.disk import write_json
from neobert.finetune.job import FinetuneResult, finetune

SEEDS_FILE = "seeds.json"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SeedsResult:
    """Runs that differ in nothing but their seed."""

    results: dict[int, FinetuneResult]
    """By seed; of a start that was stopped those until then."""

    reason: str
    """That of the last run."""

    def mean(self, metric: str) -> float:
        return statistics.fmean(result.metrics[metric] for result in self.results.values())

    def std(self, metric: str) -> float:
        """Standard deviation of a sample; 0 for one run."""
        values = [result.metrics[metric] for result in self.results.values()]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(next(iter(self.results.values())).metrics)

    def describe(self) -> str:
        """A table: a line a seed, then mean and standard deviation."""
        rows = [("seed", "step", *self.metrics)]
        rows += [
            (str(seed), str(r.best_step), *(f"{r.metrics[name]:.4f}" for name in self.metrics))
            for seed, r in self.results.items()
        ]
        rows += [
            ("mean", "", *(f"{self.mean(name):.4f}" for name in self.metrics)),
            ("std", "", *(f"{self.std(name):.4f}" for name in self.metrics)),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "seeds": {
                str(seed): {"best_step": r.best_step, "steps": r.steps, "metrics": r.metrics}
                for seed, r in self.results.items()
            },
            "mean": {name: self.mean(name) for name in self.metrics},
            "std": {name: self.std(name) for name in self.metrics},
        }


def finetune_seeds(config: Config) -> SeedsResult:
    """A run for each of `finetune.seeds`, in `<trainer.output_dir>/seed-N`. Metrics go to `seeds.json`, written after
    each run, so that a start after an interruption has those that are finished.

    Raises:
        StartupError: a run cannot start as configured; the message names the key and the remedy.
        DataError: the data cannot be used.
    """
    output_dir, results, reason = Path(config.trainer.output_dir), dict[int, FinetuneResult](), "complete"
    for seed in config.finetune.seeds:
        cli.say(f"seed {seed}: {output_dir / f'seed-{seed}'}")
        result = finetune(build_seed_config(config, seed))
        reason = result.reason
        if reason not in ("finished", "complete"):
            break
        results[seed] = result
        found = SeedsResult(results=dict(results), reason=reason)
        if result.best_step is not None:
            write_json(output_dir / SEEDS_FILE, found.as_dict())
    return SeedsResult(results=results, reason=reason)


def build_seed_config(config: Config, seed: int) -> Config:
    """The config of one of the runs."""
    output_dir = str(Path(config.trainer.output_dir) / f"seed-{seed}")
    return replace(
        config,
        seed=seed,
        finetune=replace(config.finetune, seeds=()),
        trainer=replace(config.trainer, output_dir=output_dir),
    )
