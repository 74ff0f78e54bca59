"""Makes the steps between two checkpoints of a run again, as the run did, and compares them with its log.

A run of its own is built from the config of the later checkpoint, in a temporary folder, and resumes from the earlier
one: what a resume checks (data, tokenizer, settings, the first batch) is checked here too. Only settings that change
nothing that is learned are replaced.
"""

import io
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from neobert.config.schema import Config
from neobert.errors import DataError
from neobert.train.checkpoint.audit import Line, RankLayout, ReplayAudit
from neobert.train.checkpoint.proof.digest_chain import read_steps
from neobert.train.checkpoint.proof.stretches import Segment
from neobert.train.checkpoint.resume import read_pickle, resume_or_start
from neobert.train.checkpoint.sharded_state import OPTIMIZER_FILE
from neobert.train.loop import open_loader, training_steps
from neobert.train.probes.hard_tokens import HARD_TOKENS_FILE
from neobert.train.processes.agreement import sharing_errors
from neobert.train.report.environment import describe_environment
from neobert.train.run import Run, build_run
from neobert.train.start import read_checkpoint_config, read_train_state, release_lock
from neobert.types import TrainState
from neobert.weights.folder import EMA_FILE, MODEL_FILE


@dataclass(frozen=True, kw_only=True, slots=True)
class Retrained:
    """A segment that was made again."""

    segment: Segment
    num_steps: int
    """That were computed."""

    num_different: int
    """Of them, not bit for bit those of the log."""

    first_difference: str | None
    first_loss_difference: float
    """Of the first step, which starts from the same weights: relative."""

    other_batch: int | None
    """The first step of the segment whose rows or masks are others; None without any."""

    other_tensors: tuple[str, ...] | None
    """Of the checkpoint at its end, those that differ; None where the end was not reached."""

    machine: dict[str, Any]
    bf16: bool
    seconds: float


def retrain_segment(
    run: Path, segment: Segment, log: Mapping[int, Line], *, limit: int | None, work: Path
) -> Retrained:
    """Makes a segment again, `limit` steps of it at most; the batches of the others are only read.

    Args:
        log: the run's lines by step.
        work: an empty folder.

    Raises:
        UserError: the run cannot be continued from there: its data, tokenizer or settings are others.
    """
    started = time.perf_counter()
    with _opened(run, segment, work) as (again, state):
        # Later masks follow what is computed here: of a machine that rounds otherwise they say nothing.
        given = math.inf if again.hard_tokens is None else again.hard_tokens.weights.end
        stop = segment.end if limit is None else min(segment.end, segment.start + limit)
        state = _train_until(again, state, stop)
        other = find_other_batch(again, state, segment.end, log)
        end = run / "checkpoints" / str(segment.end)
        tensors = tuple(_list_other_tensors(again, end)) if state.step == segment.end else None
        machine, bf16 = describe_environment(again)["machine"], again.config.trainer.mixed_precision == "bf16"
    lines = read_steps(work)
    layout = RankLayout(processes=1, micro_batch_rows=1)
    audit = ReplayAudit([log[x["step"]] for x in lines if x["step"] in log], before=layout, now=layout)
    audit.compare(lines)
    last = next((x["step"] for x in lines if log.get(x["step"], {}).get("loss_hex") != x["loss_hex"]), math.inf)
    batches = [
        x["step"]
        for x in lines
        if x["step"] <= max(given, last) and log.get(x["step"], {}).get("batch_digest") != x["batch_digest"]
    ]
    return Retrained(
        segment=segment,
        num_steps=len(lines),
        num_different=audit.num_different + sum(x["step"] not in log for x in lines),
        first_difference=audit.first_difference,
        first_loss_difference=_relative(log, lines[0]) if lines else 0.0,
        other_batch=batches[0] if batches else other,
        other_tensors=tensors,
        machine=machine,
        bf16=bf16,
        seconds=time.perf_counter() - started,
    )


def read_batches(run: Path, segment: Segment, log: Mapping[int, Line], *, work: Path) -> int | None:
    """The first step of a segment whose rows or masks are not those of the log; None without any. Nothing is computed.

    Raises:
        UserError: as of `retrain_segment`.
    """
    with _opened(run, segment, work) as (again, state):
        return find_other_batch(again, state, segment.end, log)


@contextmanager
def _opened(run: Path, segment: Segment, work: Path) -> Iterator[tuple[Run, TrainState]]:
    """The run of a segment at its start, silently."""
    end = run / "checkpoints" / str(segment.end)
    config = adapt_config(read_checkpoint_config(end), run, segment, read_train_state(end), work)
    if (run / "tokenizer").is_dir():
        shutil.copytree(run / "tokenizer", work / "tokenizer")
    with redirect_stdout(io.StringIO()):
        again = build_run(config)
        try:
            with sharing_errors(again.runtime):
                state = resume_or_start(again)
            yield again, state
        finally:
            release_lock(again.output_dir)
            again.runtime.close()


def adapt_config(config: Config, run: Path, segment: Segment, saved: Mapping[str, Any], work: Path) -> Config:
    """The config of a run, to be continued in one process in another folder; only free keys are others."""
    start = str(run / "checkpoints" / str(segment.start)) if segment.start else None
    tokenized = run / "tokenized"
    prepared = config.dataset.pre_tokenize_output or (str(tokenized) if tokenized.is_dir() else None)
    trainer = replace(
        config.trainer,
        output_dir=str(work),
        overwrite_output_dir=False,
        resume_from_checkpoint=start,
        global_batch_size=saved["rows_per_step"],
        gradient_accumulation_steps=None,
        health_checks=False,
        report_to=("none",),
        disable_tqdm=True,
        max_hours=None,
    )
    dataset = replace(config.dataset, pre_tokenize_output=prepared)
    return replace(config, trainer=trainer, dataset=dataset, wandb=replace(config.wandb, enabled=False))


def _train_until(run: Run, state: TrainState, stop: int) -> TrainState:
    steps = training_steps(run, state)
    try:
        for state, metrics in steps:
            run.tracker.add(state, metrics)
            if state.step >= stop:
                break
    finally:
        steps.close()  # type: ignore[attr-defined]
    run.tracker.flush()
    return state


def find_other_batch(run: Run, state: TrainState, end: int, log: Mapping[int, Line]) -> int | None:
    """The first step after `state` up to `end` whose batch is not that of the log; nothing is computed.

    Raises:
        DataError: their masks follow what is computed.
    """
    if state.step == end:
        return None
    if run.hard_tokens is not None and end >= run.hard_tokens.weights.end:
        raise DataError(
            "datacollator.mask_weights: adaptive: these batches cannot be read without training the steps before; "
            "leave out --limit, or raise --samples"
        )
    loader = open_loader(run, state)
    try:
        for step in range(state.step + 1, end + 1):
            batch = loader.next_unless(lambda: False)
            if batch is None or f"{batch.digest:016x}" != log.get(step, {}).get("batch_digest"):
                return step
    finally:
        loader.close()
    return None


def _relative(log: Mapping[int, Line], line: Line) -> float:
    before = float.fromhex(log.get(line["step"], {}).get("loss_hex", "nan"))
    return abs(float.fromhex(line["loss_hex"]) - before) / max(abs(before), 1e-9)


def _list_other_tensors(run: Run, checkpoint: Path) -> Iterator[str]:
    """What of weights, their average, optimizer and weights of masks is not that of a checkpoint, bit for bit."""
    weights = run.module.state_dict()
    kinds = {MODEL_FILE: weights}
    if run.average is not None and run.average.started:
        kinds[EMA_FILE] = weights | run.average.tensors()
    if run.hard_tokens is not None:
        kinds[HARD_TOKENS_FILE] = run.hard_tokens.read()
    for file, tensors in kinds.items():
        saved = load_file(checkpoint / file)
        yield from (
            f"{file}: {name}" for name in tensors.keys() | saved if not _equal(tensors.get(name), saved.get(name))
        )
    if (checkpoint / OPTIMIZER_FILE).is_file():
        saved_state, state = read_pickle(checkpoint / OPTIMIZER_FILE)["state"], run.optimizer.state_dict()["state"]
        yield from (
            f"{OPTIMIZER_FILE}: state {number}"
            for number in state.keys() | saved_state
            if not _equal(state.get(number), saved_state.get(number))
        )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one.cpu(), other.cpu())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    return bool(one == other)
