"""Replays a record of the speedrun: `same`, `within noise`, or `not`.

Bits repeat on one kind of CPU with one version of the code and of torch. Elsewhere a run drifts away from the recorded
one as another seed would, so its held-out loss is compared with the interval in which further seeds are expected.
"""

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

from neobert.benchmark import trial
from neobert.benchmark.experiment_plan import use_local
from neobert.benchmark.speedrun import check_tokenizer, describe_environment, train_once
from neobert.benchmark.speedrun_data import check_data, digest_manifest
from neobert.benchmark.speedrun_records import (
    CONFIG,
    LEVEL,
    SeedRun,
    SpeedRecord,
    check_statistics,
    load_record,
    predict_interval,
)
from neobert.benchmark.speedrun_tracks import SpeedrunError, build_config, choose_track
from neobert.train.processes.agreement import digest_code

ROUNDING = 1e-5
"""Nats by which the held-out loss of equal weights may differ on two CPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """One seed of a record, made again."""

    verdict: str
    """same, within noise, or not."""

    lines: tuple[str, ...]


def verify_record(
    folder: Path, data: Path, home: Path, *, tokenizer: Path | None, seeds: Sequence[int]
) -> Iterator[Replayed]:
    """Makes seeds of a record again (the first one, unless others are named) and compares them with it.

    Raises:
        SpeedrunError: its files or the data are not those that were recorded, or it has no such seed.
    """
    record = load_record(folder)
    track = choose_track(record.track)
    unknown = [seed for seed in seeds if seed not in record.losses]
    if unknown or not record.runs:
        raise SpeedrunError(f"--seed: {unknown or 'none'}; {folder} has the seeds {sorted(record.losses)}")
    if dataclasses.asdict(trial.HELD_OUT) != record.held_out:
        raise SpeedrunError(f"{folder}: was evaluated with {record.held_out}; this version asks {trial.HELD_OUT}")
    if track.gpus and not torch.cuda.is_available():
        raise SpeedrunError(
            f"{track.name}: was set on {track.hardware}, and this machine has no GPU; use one with a GPU"
        )
    manifest = check_data(track, data, home)
    if digest_manifest(manifest) != record.data_sha256:
        raise SpeedrunError(f"--data: {data} is {manifest['name']}, and {folder} was trained on {record.data}")
    check_statistics()
    trial.use_threads(record.threads)
    check_tokenizer(track, build_config(track, folder / CONFIG, (), data), tokenizer)
    for seed in seeds or [record.runs[0].seed]:
        with tempfile.TemporaryDirectory() as work:
            overrides = [*use_local(data, tokenizer), f"seed={seed}"]
            again = train_once(
                folder / CONFIG,
                overrides,
                Path(work) / "run",
                seed,
                num_steps=record.num_steps,
                data=data,
                resume=False,
            )
        yield judge(record, again)


def judge(record: SpeedRecord, again: SeedRun) -> Replayed:
    """What a replay says of a record: `same` when every loss is, to the last bit."""
    (before,) = [run for run in record.runs if run.seed == again.seed]
    name = f"seed {again.seed}: held-out loss {again.loss:.6f}, recorded {before.loss:.6f}"
    if again.losses_sha256 == before.losses_sha256:
        equal = f"the training loss of all {again.num_steps:,} steps is equal, bit for bit"
        if abs(again.loss - before.loss) <= ROUNDING:
            return Replayed(verdict="same", lines=(f"{name}; {equal}",))
        return Replayed(verdict="not", lines=(f"{name}; {equal}, so the recorded held-out loss is wrong",))
    inside, scale = _compare_with_seeds(record, again.loss)
    notes = tuple(_explain_difference(record, before, again))
    return Replayed(verdict="within noise" if inside else "not", lines=(f"{name}; {scale}", *notes))


def _compare_with_seeds(record: SpeedRecord, loss: float) -> tuple[bool, str]:
    losses = list(record.losses.values())
    interval = predict_interval(losses)
    if interval is None:
        return False, "one seed says nothing about noise"
    low, high = interval
    summary = f"mean {mean(losses):.4f}, std {stdev(losses):.4f}, n = {len(losses)}"
    return low <= loss <= high, f"{LEVEL:.0%} of further seeds are expected in {low:.4f} to {high:.4f} ({summary})"


def _explain_difference(record: SpeedRecord, before: SeedRun, again: SeedRun) -> Iterator[str]:
    """What differs besides the losses, and what therefore cannot be known."""
    yield "rows and masks are equal" if again.batches_sha256 == before.batches_sha256 else "rows or masks differ"
    if again.tokenizer_sha256 != before.tokenizer_sha256:
        yield "the tokenizer that was trained here is another one"
    here = {**describe_environment(), "code": digest_code()}
    there = {**record.environment, "code": record.code["sha256"]}
    other = [
        f"{name} {there.get(name)} there, {value} here" for name, value in here.items() if there.get(name) != value
    ]
    if other:
        yield f"bits cannot be compared, the loss alone can: {'; '.join(other)}"
    else:
        yield "machine and code are the same, so every bit should be"
    if (limit := choose_track(record.track).seconds) is not None:
        yield (
            f"{again.seconds:,.1f} s here, {before.seconds:,.1f} s there, limit {limit:,.0f} s: only a machine of the "
            "same kind can show the time"
        )
