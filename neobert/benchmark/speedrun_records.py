"""Records of the speedrun as files, and whether one is better than the one before it. Nothing here needs torch.

A record is a folder of `speedrun/records`: `record.json`, the config that was trained, and a thinned log of each seed.

A record replaces the one before it, on the same data with the same tokenizer, when its mean held-out loss is lower and
p < 0.01, one-sided: by a paired t-test where both have the same seeds (same rows where the config leaves them as they
are, same evaluation masks), else by Welch's.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, get_origin, get_type_hints

from neobert.benchmark.speedrun_tracks import TRACKS, SpeedrunError
from neobert.disk import write_text

RECORD, CONFIG = "record.json", "config.yaml"

ALPHA = 0.01
"""A new record needs a smaller p."""

MIN_SEEDS = 3
"""Of a record."""

LEVEL = 0.99
"""Of the interval in which a replay on other hardware is expected."""


_ROUNDING = 1e-12
"""Nats: differences of losses that are equal on paper differ by less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedRun:
    """One finished seed."""

    seed: int
    num_steps: int
    seconds: float
    """Of training, as the yardstick counts them."""

    num_tokens: int
    """Real tokens, without padding."""

    loss: float
    """Held-out, in nats per masked token."""

    accuracy: float
    num_targets: int
    num_documents: int
    tokenizer_sha256: str
    """Of the vocabulary and of the tokens of a sentence."""

    first_loss_hex: str
    last_loss_hex: str
    losses_sha256: str
    """Of the training loss of every step, to the last bit."""

    batches_sha256: str
    """Of the rows and masks of every step."""

    gemm_flops: dict[str, float]
    """FLOP/s of matrix products just before the run, by precision."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedRecord:
    """The content of a `record.json`."""

    format: int = 1
    track: str
    title: str
    idea: str
    """One sentence."""

    created: str
    """UTC, when it was started; records are compared in this order."""

    data: str
    data_sha256: str
    """Of the manifest's files."""

    config_sha256: str
    num_steps: int
    threads: int
    seeds: tuple[int, ...]
    """That were requested; the record is whole when each has its run."""

    held_out: dict[str, Any]
    code: dict[str, Any]
    """commit, clean (no change to the package since), sha256 (of the package's source)."""

    environment: dict[str, Any]
    runs: tuple[SeedRun, ...] = ()

    @property
    def losses(self) -> dict[int, float]:
        """By seed."""
        return {run.seed: run.loss for run in self.runs}

    @property
    def missing_seeds(self) -> list[int]:
        return [seed for seed in self.seeds if seed not in self.losses]

    @property
    def excess(self) -> float:
        """Seconds of the slowest seed beyond the limit of the track; 0 within it and without a clock."""
        limit = TRACKS[self.track].seconds
        return max([0.0, *(run.seconds - limit for run in self.runs)]) if limit is not None else 0.0

    def summarize(self) -> dict[str, float | None]:
        """Mean and sample standard deviation (n - 1) of the held-out losses."""
        losses = list(self.losses.values())
        return {
            "mean": mean(losses) if losses else None,
            "std": stdev(losses) if len(losses) > 1 else None,
        }


def write_record(folder: Path, record: SpeedRecord) -> None:
    """Replaces `record.json`."""
    text = json.dumps({**dataclasses.asdict(record), **record.summarize()}, indent=1)
    write_text(folder / RECORD, text + "\n")


def load_record(folder: Path) -> SpeedRecord:
    """The record in a folder, checked against its config.

    Raises:
        SpeedrunError: a file is missing or no record, or the config or a statistic is not the one that was recorded.
    """
    file = folder / RECORD
    try:
        values = json.loads(file.read_text())
        summary = {name: values.pop(name) for name in ("mean", "std")}
        runs = tuple(SeedRun(**run) for run in values.pop("runs"))
        record = SpeedRecord(**{**values, "seeds": tuple(values["seeds"]), "runs": runs})
        _check_types(record)
        for run in runs:
            _check_types(run)
    except FileNotFoundError as error:
        raise SpeedrunError(f"{file} is not there; name the folder of a record") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpeedrunError(f"{file}: is no record of this version ({error}); restore the file") from error
    if record.format != 1 or record.track not in TRACKS:
        raise SpeedrunError(f"{file}: format {record.format}, track {record.track!r}; this version knows neither")
    if summary != record.summarize():
        raise SpeedrunError(f"{file}: mean and std are {summary}, and those of its runs {record.summarize()}")
    config = folder / CONFIG
    if not config.is_file() or digest_text(config.read_text()) != record.config_sha256:
        raise SpeedrunError(f"{config} is not the config that was recorded: its sha256 differs; restore both files")
    return record


def _check_types(part: SpeedRecord | SeedRun) -> None:
    """Raises TypeError when a value is not of the type of its field."""
    for name, kind in get_type_hints(type(part)).items():
        value = getattr(part, name)
        items = value if kind == tuple[int, ...] else ()
        expected = (int, float) if kind is float else get_origin(kind) or kind
        if not isinstance(value, expected) or not all(isinstance(item, int) for item in items):
            raise TypeError(f"{name} is {value!r}")


def digest_text(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def load_records(home: Path) -> dict[str, SpeedRecord]:
    """The records of `speedrun/records` by the name of their folder, in the order in which they were started."""
    folders = [file.parent for file in sorted(home.glob(f"records/*/{RECORD}"))]
    found = {folder.name: load_record(folder) for folder in folders}
    return dict(sorted(found.items(), key=lambda item: (item[1].created, item[0])))


# ---- statistics ----


@dataclass(frozen=True, kw_only=True, slots=True)
class LossComparison:
    """A record against the one before it."""

    difference: float
    """Mean loss after less mean loss before: negative is better."""

    p: float | None
    """That chance alone brings so much or more; None where it cannot be computed."""

    paired: bool

    @property
    def is_better(self) -> bool:
        return self.p is not None and self.p < ALPHA


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise SpeedrunError("p-values of the speedrun need the package scipy: pip install scipy") from error
    return stats


def check_statistics() -> None:
    """Raises SpeedrunError where scipy is missing."""
    _stats()


def compare_losses(before: Mapping[int, float], after: Mapping[int, float]) -> LossComparison:
    """Whether losses by seed are lower than others, one-sided: paired for equal seeds, else Welch's t-test."""
    paired = before.keys() == after.keys()
    difference = mean(after.values()) - mean(before.values())
    one, other = [list(after.values()), [before[seed] for seed in after] if paired else list(before.values())]
    p = None
    if min(len(one), len(other)) > 1 and not _is_constant(one, other, paired):
        stats = _stats()
        test = stats.ttest_rel if paired else stats.ttest_ind
        p = float(test(one, other, alternative="less", **({} if paired else {"equal_var": False})).pvalue)
    return LossComparison(difference=difference, p=p, paired=paired)


def _is_constant(one: Sequence[float], other: Sequence[float], paired: bool) -> bool:
    """Whether nothing varies but by rounding, so that there is no t."""
    samples = [[a - b for a, b in zip(one, other)]] if paired else [one, other]
    return all(max(sample) - min(sample) <= _ROUNDING for sample in samples)


def predict_interval(losses: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Where one more loss is expected: mean -+ t(n - 1) x std x sqrt(1 + 1/n); None for fewer than two."""
    if len(losses) < 2:
        return None
    num = len(losses)
    half = float(_stats().t.ppf((1 + level) / 2, num - 1)) * stdev(losses) * math.sqrt(1 + 1 / num)
    return mean(losses) - half, mean(losses) + half


# ---- which are records ----


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedRecord:
    """A record with its verdict."""

    name: str
    record: SpeedRecord
    comparison: LossComparison | None
    """With the record before it; None for the first of its group, and for one that is not compared."""

    problem: str | None
    """Why it is no record."""


def rank_records(records: Mapping[str, SpeedRecord]) -> dict[tuple[str, str, str], list[RankedRecord]]:
    """Records by (track, data, tokenizer), in their order, each compared with the last one that is a record."""
    groups: dict[tuple[str, str, str], list[RankedRecord]] = {}
    for name, record in records.items():
        tokenizer = record.runs[0].tokenizer_sha256 if record.runs else ""
        group = groups.setdefault((record.track, record.data_sha256, tokenizer), [])
        best = next((x.record for x in reversed(group) if x.problem is None), None)
        group.append(_rank(name, record, best))
    return groups


def _rank(name: str, record: SpeedRecord, best: SpeedRecord | None) -> RankedRecord:
    comparison, problem = None, None
    if record.missing_seeds:
        problem = f"seeds {', '.join(map(str, record.missing_seeds))} are missing"
    elif record.excess:
        problem = f"{record.excess:.1f} s over the limit"
    elif len(record.losses) < MIN_SEEDS:
        problem = f"{len(record.losses)} of at least {MIN_SEEDS} seeds"
    elif best is not None:
        comparison = compare_losses(best.losses, record.losses)
        problem = None if comparison.is_better else f"not better with p < {ALPHA}"
    return RankedRecord(name=name, record=record, comparison=comparison, problem=problem)
