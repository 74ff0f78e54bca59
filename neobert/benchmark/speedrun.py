"""Sets a record of the speedrun.

A record trains one config with several seeds, each for the same number of steps. Under a clock that number is what
fits, as the yardstick measures it, less a margin: a throw-away run is a few seconds long, and a seed that takes longer
than the limit makes the whole no record.

A finished seed is in `record.json` and is not made again. A seed that was killed starts from scratch under a clock,
since two parts of a run are not a run of that time; without one it resumes from its newest checkpoint.
"""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import neobert
from neobert import cli
from neobert.benchmark import trial
from neobert.benchmark.doctor import measure_rates
from neobert.benchmark.experiment_plan import use_local
from neobert.benchmark.speedrun_data import check_data, digest_manifest
from neobert.benchmark.speedrun_records import (
    CONFIG,
    RECORD,
    SeedRun,
    SpeedRecord,
    digest_text,
    load_record,
    write_record,
)
from neobert.benchmark.speedrun_tracks import SpeedrunError, Track, build_config
from neobert.config.load import config_to_yaml, load_config, without_secrets
from neobert.config.schema import Config
from neobert.config.schema_data import TokenizerSection
from neobert.data.rows.batch_size import build_batch_schedule
from neobert.data.tokenizer import Tokenizer, load_tokenizer
from neobert.disk import locked, write_text
from neobert.host import available_cpus, describe_cpu
from neobert.inference.model import load
from neobert.train.build import choose_rows_per_step
from neobert.train.checkpoint.proof.digest_chain import read_steps
from neobert.train.processes.agreement import PACKAGES, digest_code, version
from neobert.train.record.sinks import LineFile
from neobert.weights.folder import valid_steps

MARGIN = 0.02
"""Of the limit that is left free: how far the speed of a few steps is from that of a whole run."""

_PROBE = "Über naïve cafés: it's 3.14 — [MASK] and\n\tdef f(x): return x"

_LOGGED = ("step", "loss", "lr", "tokens", "seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordRequest:
    """What `neobert speedrun run` is asked for."""

    track: Track
    config: Path
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    data: Path
    tokenizer: Path | None
    output: Path
    """The folder of the record."""

    work: Path
    """Where the runs are written; nothing of it is committed."""

    home: Path
    title: str | None
    """None: that of the record, and of a new one the name of its folder."""

    idea: str | None
    """None: that of the record; a new one needs it."""

    threads: int
    num_steps: int | None
    """None: as many as the limit allows."""

    speed_steps: int = 50


def make_record(request: RecordRequest) -> SpeedRecord:
    """Trains what is missing of a record and writes it, seed by seed. Progress on the error output.

    Raises:
        SpeedrunError: anything of the request breaks a rule, or the folder holds another record.
        Stopped: a seed was interrupted, or its numbers went bad; the same command continues.
    """
    trial.use_threads(request.threads)
    check_hardware(request.track, request.threads)
    with locked(request.work):
        record = _open_record(request)
        local = use_local(request.data, request.tokenizer)
        for seed in record.missing_seeds:
            run = _train_seed(request, record, seed, local)
            record = dataclasses.replace(record, runs=(*record.runs, run))
            write_record(request.output, record)
            cli.say(f"seed {seed}: held-out loss {run.loss:.4f}, {run.num_steps:,} steps in {run.seconds:,.1f} s")
            shutil.rmtree(request.work / f"seed-{seed}", ignore_errors=True)
    return record


def check_hardware(track: Track, threads: int) -> None:
    """Raises SpeedrunError when this machine is not of the class of a track."""
    if track.gpus:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        if not any(gpu in name for gpu in track.gpus):
            raise SpeedrunError(f"{track.name}: needs {track.hardware}, and this machine has {name}")
    if track.threads is not None and threads != track.threads:
        raise SpeedrunError(f"--threads: {threads}, and {track.name} computes with {track.threads}; leave it out")
    if track.threads is not None and available_cpus() < track.threads:
        raise SpeedrunError(
            f"{track.name}: needs {track.hardware}, and this process may keep {available_cpus()} busy; "
            "free another, or use another machine"
        )


def _open_record(request: RecordRequest) -> SpeedRecord:
    """The record as far as it is made; a new one is started, its config written, its steps counted."""
    track, made = request.track, request.output / CONFIG
    config = build_config(track, request.config, request.settings, request.data)
    asked, longest = trial.HELD_OUT.max_length, config.model.max_position_embeddings
    if asked is not None and longest < asked:
        raise SpeedrunError(
            f"model.max_position_embeddings: {longest}, and the evaluation reads {asked} tokens of a document; "
            f"write {asked} or more"
        )
    manifest = check_data(track, request.data, request.home)
    check_tokenizer(track, config, request.tokenizer)
    precision = trial.fix_precision(config, [made] if made.is_file() else [])
    config = build_config(track, request.config, [*request.settings, *precision], request.data)
    text = _config_text(config)
    facts: dict[str, Any] = {
        "track": track.name,
        "data": manifest["name"],
        "data_sha256": digest_manifest(manifest),
        "config_sha256": digest_text(text),
        "threads": request.threads,
        "held_out": dataclasses.asdict(trial.HELD_OUT),
        "code": describe_code(),
        "environment": describe_environment(),
    }
    if (request.output / RECORD).is_file():
        return _continue_record(request, facts)
    if request.output.is_dir() and any(request.output.iterdir()):
        raise SpeedrunError(f"--output: {request.output} holds files already and no record; choose another folder")
    if (idea := request.idea) is None:
        raise SpeedrunError("--idea: a new record needs one: say in one sentence what is new")
    request.output.mkdir(parents=True, exist_ok=True)
    counted = request.work / CONFIG  # Not yet in the record's folder: an interruption leaves that empty.
    write_text(counted, text)
    record = SpeedRecord(
        **facts,
        title=request.title or request.output.absolute().name,
        idea=idea,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        num_steps=_count_steps(request, config, counted),
        seeds=request.seeds,
    )
    write_text(made, text)
    write_record(request.output, record)
    return record


def _config_text(config: Config) -> str:
    """What is committed: no path and no tokenizer of this machine, no seed, no number of steps."""
    data = dataclasses.replace(config.dataset, path=None)
    trainer = dataclasses.replace(config.trainer, output_dir=Config().trainer.output_dir)
    return config_to_yaml(without_secrets(dataclasses.replace(config, dataset=data, trainer=trainer)))


def _continue_record(request: RecordRequest, facts: dict[str, Any]) -> SpeedRecord:
    record = load_record(request.output)
    for name, now in facts.items():
        before = getattr(record, name)
        if name == "code":  # A commit that changes nothing of the package is no other code.
            before, now = before["sha256"], now["sha256"]
        if before != now:
            raise SpeedrunError(
                f"{request.output}: was started with {name} {before}, and now it is {now}; choose another --output, or "
                "continue as it was started"
            )
    if request.num_steps not in (None, record.num_steps):
        raise SpeedrunError(
            f"--steps: {request.num_steps}, and the seeds of {request.output} make {record.num_steps}; leave it out"
        )
    for run in record.runs:
        cli.say(f"seed {run.seed}: finished before, held-out loss {run.loss:.4f}")
    record = dataclasses.replace(
        record,
        title=request.title or record.title,
        idea=request.idea or record.idea,
        seeds=tuple(dict.fromkeys([*record.seeds, *request.seeds])),
    )
    write_record(request.output, record)
    return record


def check_tokenizer(track: Track, config: Config, local: Path | None) -> None:
    """Raises SpeedrunError when the tokenizer is not that of the track; one that each run trains is not looked at."""
    if config.tokenizer.train:
        if local is not None:
            raise SpeedrunError(f"--tokenizer: {local}, but the runs of {track.name} train their own; leave it out")
        return
    section = config.tokenizer if local is None else TokenizerSection(path=str(local))
    found = digest_tokenizer(load_tokenizer(section))
    if track.tokenizer_sha256 not in (None, found):
        raise SpeedrunError(
            f"--tokenizer: {local or config.tokenizer.name} makes other tokens than that of {track.name} (digest "
            f"{found[:16]}..., not {str(track.tokenizer_sha256)[:16]}...); use {' '.join(track.tokenizer)}"
        )


def digest_tokenizer(tokenizer: Tokenizer) -> str:
    """SHA-256 of the vocabulary, the special tokens and the tokens of a sentence: what a copy in another file keeps."""
    (ids,) = tokenizer.encode_batch([_PROBE])
    return digest_text(json.dumps([sorted(tokenizer.vocabulary.items()), tokenizer.roles, ids.tolist()]))


def _count_steps(request: RecordRequest, config: Config, file: Path) -> int:
    if request.track.slots is not None:
        most = count_slot_steps(request.track.slots, config)
        if request.num_steps is not None and request.num_steps > most:
            raise SpeedrunError(
                f"--steps: {request.num_steps}, and {request.track.limit} are {most} steps; leave it out"
            )
        return request.num_steps or most
    assert request.track.seconds is not None
    if request.num_steps is not None:
        return request.num_steps
    seconds = request.track.seconds * (1 - MARGIN)
    overrides = use_local(request.data, request.tokenizer)
    return trial.measure_steps(file, overrides, seconds=seconds, steps=request.speed_steps)


def count_slot_steps(slots: int, config: Config) -> int:
    """The most steps whose rows x `dataset.max_seq_length` are no more than `slots`.

    Raises:
        SpeedrunError: the rows of a step are not fixed, or the first step has more slots.
    """
    if not config.trainer.enforce_full_packed_batches:
        raise SpeedrunError("trainer.enforce_full_packed_batches: false; rows cannot be counted ahead, write true")
    schedule, length = build_batch_schedule(config, choose_rows_per_step(config, 1)), config.dataset.max_seq_length
    steps = schedule.steps_for(slots, per_row=length)
    if schedule.rows_before(steps) * length > slots:
        steps -= 1
    if not steps:
        raise SpeedrunError(
            f"dataset.max_seq_length: a step of {schedule(0)} rows of {length} has more than {slots:,} row slots; use "
            "fewer rows"
        )
    return steps


def _train_seed(request: RecordRequest, record: SpeedRecord, seed: int, local: Sequence[str]) -> SeedRun:
    folder, is_timed = request.work / f"seed-{seed}", request.track.seconds is not None
    overrides = [*local, f"seed={seed}"]
    if is_timed and folder.exists():
        cli.say(f"seed {seed}: was interrupted; starts from scratch, the clock counts whole runs only")
        shutil.rmtree(folder)
    elif not is_timed:
        saved = valid_steps(folder) if folder.exists() else []
        cli.say(f"seed {seed}: resumes from step {saved[-1]:,}" if saved else f"seed {seed}: starts from scratch")
        every = max(1, record.num_steps // 10)
        overrides += ["trainer.save_strategy=steps", f"trainer.save_steps={every}", "trainer.save_total_limit=1"]
    run = train_once(
        request.output / CONFIG,
        overrides,
        folder,
        seed,
        num_steps=record.num_steps,
        data=request.data,
        resume=not is_timed,
    )
    lines = [line for line in LineFile(folder / "log.jsonl").read() if line.get("kind") == "log"]
    thin = [json.dumps({name: line[name] for name in _LOGGED if name in line}) for line in lines]
    write_text(request.output / f"seed-{seed}.jsonl", "\n".join(thin) + "\n")
    return run


def train_once(
    config: Path, overrides: Sequence[str], folder: Path, seed: int, *, num_steps: int, data: Path, resume: bool
) -> SeedRun:
    """One seed, trained and scored."""
    means_cpu = load_config(config, [*overrides, "trainer.max_steps=1"]).trainer.means_cpu
    rates = measure_rates(torch.device("cpu" if means_cpu else "cuda"))
    result = trial.measure(config, overrides, folder, num_steps=num_steps, data=data, resume=resume)
    steps = read_steps(folder)
    return SeedRun(
        seed=seed,
        num_steps=result["num_steps"],
        seconds=result["training_seconds"],
        num_tokens=result["num_tokens"],
        **{name: result[name] for name in ("loss", "accuracy", "num_targets", "num_documents")},
        tokenizer_sha256=digest_tokenizer(load(folder, device="cpu").tokenizer),
        first_loss_hex=steps[0]["loss_hex"],
        last_loss_hex=steps[-1]["loss_hex"],
        losses_sha256=_digest_column(steps, "loss_hex"),
        batches_sha256=_digest_column(steps, "batch_digest"),
        gemm_flops=rates,
    )


def _digest_column(steps: Iterable[dict[str, Any]], name: str) -> str:
    return digest_text("\n".join(f"{line['step']} {line[name]}" for line in steps))


def describe_code() -> dict[str, Any]:
    """The commit of the code, whether the package is as in it, and a digest of its source; no commit outside git."""
    package = Path(neobert.__file__).parent

    def ask(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    commit, changes = ask("rev-parse", "HEAD"), ask("status", "--porcelain", "--", ".")
    return {"commit": commit, "clean": None if commit is None else changes == "", "sha256": digest_code()}


def describe_environment() -> dict[str, Any]:
    """The machine and the versions that compute."""
    return {
        **trial.describe_machine(),
        "cpu": describe_cpu(),
        "cores": available_cpus(),
        "cores_of_the_machine": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }
