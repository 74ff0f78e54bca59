"""The training loop: `train` is the whole story on one screen, `training_steps` turns batches into steps."""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Union

import torch
from torch.profiler import record_function

from neobert.config.schema import Config
from neobert.data.rows.loader import Loader
from neobert.data.rows.order import step_seed
from neobert.data.source.hub import write_documents
from neobert.objectives.table import check_task
from neobert.optim.schedule import choose_muon_beta
from neobert.testing.faults import fault_point
from neobert.train.checkpoint.identity import as_int64, check_next_batch
from neobert.train.checkpoint.resume import resume_or_start, roll_back
from neobert.train.checkpoint.save import complete_save, save_checkpoint, save_is_due
from neobert.train.finish import finish, stop_early
from neobert.train.hardware.memory import memory_explained
from neobert.train.pretraining import log_evaluation, look_at_health
from neobert.train.probes.probing import log_probes, probing_missing
from neobert.train.processes.agreement import meet, sharing_errors
from neobert.train.processes.heartbeat import naming_lost_ranks
from neobert.train.record.profiling import DATA_WAIT, profiled
from neobert.train.report.environment import describe_environment
from neobert.train.run import Run, build_run
from neobert.train.step import BatchCopier, StepMetrics, train_step
from neobert.types import StepBatch, StepCounts, TrainState

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How a run ended."""

    state: TrainState
    reason: str
    """A key of EXIT_CODES. `finished`: the budget is spent; `complete`: it was spent before this start; `preempted`,
    `out_of_time`, `numbers`: stopped before; `disk`: the last checkpoint could not be written."""


def due(step: int, every: int) -> bool:
    """Whether an interval ends at this step; 0 means never."""
    return every > 0 and step % every == 0


def pretrain(config: Config, data: Union["Dataset", Sequence[str], None] = None) -> RunResult:
    """Pretraining on documents, for the objective that `trainer.objective` names.

    Args:
        data: a Dataset with a column of text, or texts, instead of the source that the config names. They are written
            once to `<trainer.output_dir>-data/<digest of their content>`, which is what the run reads: a start with
            equal data resumes exactly, one with other data is refused.

    Raises:
        DataError: `data` is neither, or empty, or other documents than this output folder was started with.
        StartupError: the run cannot start as configured; the message names the key and the remedy.
    """
    check_task(config, "pretraining")
    if data is not None:
        output_dir = Path(config.trainer.output_dir)
        folder = write_documents(data, output_dir.with_name(f"{output_dir.name}-data"))
        section = replace(config.dataset, path=str(folder), name=None, mixture=(), config=None, revision=None)
        config = replace(config, dataset=section)
    return train(build_run(config))


def train(run: Run) -> RunResult:
    """Trains until the budget is spent: announce, resume, then step, log, evaluate and save when due.

    Raises:
        RankLostError: another process has ended. Where it is known which, this one ends with a sentence that says so.
    """
    try:
        with naming_lost_ranks(run.runtime.heartbeat):
            return _train(run)
    finally:
        run.reporter.stop_progress()  # An error is not drawn into a bar.


def _train(run: Run) -> RunResult:
    with sharing_errors(run.runtime):
        run.job.announce(run)
    with run.stop.listening():  # From here on a signal saves and stops.
        with sharing_errors(run.runtime):
            state = resume_or_start(run)
            if run.data.inventory.files:
                run.tracker.note_once("inventory", 0, files=run.data.inventory.as_lines())
            run.tracker.note_once("environment", 0, **describe_environment(run))
            if run.health is not None:
                run.health.begin(state.step)
        if evaluation_missing(run, state):
            log_evaluation(run, state)
        if probing_missing(run, state):
            log_probes(run, state)
        is_done = state.step >= run.num_steps or run.job.is_done(run)
        reason, steps = "complete" if is_done else "finished", iter(()) if is_done else training_steps(run, state)
        for state, metrics in profiled(run, state, steps):  # noqa: B020 (of `state`, the first only)
            run.runtime.at(f"what follows step {state.step} (log, evaluation, save)", patient=True)
            run.tracker.add(state, metrics)
            if run.stop_requested():
                break
            if due(state.step, run.logging_steps):
                run.tracker.log(state, run.read_metrics())
                look_at_health(run, state)
            if due(state.step, run.eval_steps):
                log_evaluation(run, state)
            if probing_missing(run, state):
                log_probes(run, state)
            if save_is_due(run, state.step):
                save_checkpoint(run, state)
            complete_save(run)  # Of a save in the background that is written by now.
            fault_point("step.done", state.step)
            if run.committer.gave_up or (due(state.step, run.eval_steps) and run.job.is_done(run)):
                break
        run.runtime.at("the end of the run", patient=True)
        if run.stop_requested():
            stop_early(run, state)
        else:
            finish(run, state)
    return RunResult(state=state, reason="disk" if run.committer.failed else run.stop.reason or reason)


def evaluation_missing(run: Run, state: TrainState) -> bool:
    """Whether an evaluation belongs to the first state and is not in the log: at step 0, or where a stop cut it off."""
    belongs = due(state.step, run.eval_steps) or state.step == run.num_steps
    return belongs and not run.tracker.evaluated(state.step)


def training_steps(run: Run, state: TrainState) -> Iterator[tuple[TrainState, StepMetrics]]:
    """Yields the state and the metrics after every optimizer step, until the budget is spent or the run is to stop.

    Everything a step depends on is a function of its number: the rows (loader state), their masks, the learning rate
    and the seed of the dropout masks. So a run continued from a checkpoint repeats the uninterrupted one.
    """
    run.guard.begin(state)
    if state.step >= run.num_steps or run.stop_requested():
        return
    loader = open_loader(run, state)
    expected: str | None = state.data.get("next_batch_digest")
    copier, frozen = BatchCopier(run.runtime.device), False
    anomalies = torch.autograd.detect_anomaly if run.config.trainer.detect_anomaly else nullcontext
    try:
        while state.step < run.num_steps:
            with run.stop.timing_step(), anomalies():
                run.runtime.at(f"the data of step {state.step + 1}")
                found = next_batch(run, loader)
                if found is None:
                    return
                batch, counts, data_wait = found
                if expected is not None:
                    check_next_batch(expected, run.runtime.sum_on_host([as_int64(batch.digest)])[0])
                    expected = None
                run.runtime.at(f"step {state.step + 1}")
                batch = copier.copy(batch)
                if run.hard_tokens is not None:
                    run.hard_tokens.measure(state.step, batch)
                state, metrics = take_step(run, state, batch, counts, data_wait)
                if run.hard_tokens is not None:
                    run.hard_tokens.refresh(state.step)
            if not frozen:
                freeze_what_lives()
                frozen = True
            if state.step == run.num_steps:
                run.guard.flush()  # No later step will read its flag.
            if run.guard.verdict is not None:
                run.runtime.at(f"what follows the bad numbers of step {state.step}", patient=True)
                earlier = roll_back(run, state)
                if earlier is not None:
                    loader.close()
                    loader = open_loader(run, earlier)
                    state = earlier
                    run.guard.begin(state)
                    continue
                run.stop.reason = "numbers"
            if run.config.dataset.persistent_workers or not due(state.step, run.eval_steps):
                yield state, metrics
            else:  # The evaluation has the memory and the cores for itself.
                loader.close()
                yield state, metrics
                loader = open_loader(run, state)
    finally:
        loader.close()
        gc.unfreeze()


def open_loader(run: Run, state: TrainState) -> Loader:
    """The batches after `state`. Collective.

    Raises:
        RankError: another rank cannot open its data.
    """
    with sharing_errors(run.runtime):
        return run.data.loader(state.data or None, skip=state.skip_rows, step=state.step)


def freeze_what_lives() -> None:
    """Takes all objects of now out of the garbage collector's sight, so that it skips what a step makes only.

    Called after the first step, when model, optimizer state and compiled code are there: a full collection walks
    hundreds of thousands of objects of the libraries and holds up the step that happens to trigger it.
    """
    gc.freeze()


def next_batch(run: Run, loader: Loader) -> tuple[StepBatch, StepCounts, float] | None:
    """This rank's next batch, the counts of all ranks, and the seconds this one waited; None when the ranks agree to
    stop before it.

    Here is the one host-side collective of a step. A rank that is asked to stop while it waits for data, or whose data
    cannot be read, joins it with zeros, so that the others neither wait forever nor make a step without it.
    """
    batch, failure, start = None, None, time.perf_counter()
    try:
        with record_function(DATA_WAIT):
            batch = loader.next_unless(run.stop.requested)
    except Exception as error:  # Raised again below, when the other ranks know.
        failure = error
    data_wait = time.perf_counter() - start
    counts = [0] * len(StepCounts._fields) if batch is None else batch.counts
    *sums, failed, writing, signalled, out_of_time = run.runtime.sum_on_host(
        [*counts, int(failure is not None), int(run.committer.is_writing()), *run.stop.requests()]
    )
    run.committer.agree(writing)
    if failed:
        meet(run.runtime, failure=failure)
    if run.stop.agree(signalled, out_of_time):
        return None
    assert batch is not None, "a batch is withheld only when a stop is requested"
    return batch, StepCounts(*sums), data_wait


def take_step(
    run: Run, state: TrainState, batch: StepBatch, counts: StepCounts, data_wait: float
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step on a batch of the device: the state after it, and its metrics, which stay there."""
    runtime = run.runtime
    torch.manual_seed(step_seed(run.config.seed, state.step, runtime.rank))
    lr = run.schedule(state.step)
    measuring = run.clip.measuring(state.step, len(batch.micro_batches)) if run.clip else nullcontext()
    watched = run.statistics is not None and due(state.step + 1, run.logging_steps)
    watching = run.statistics.watching(batch.micro_batches[-1]) if run.statistics and watched else nullcontext()
    with memory_explained(run, batch.micro_batches[0], "train"), measuring, watching as observe:
        result = train_step(
            run.model,
            run.optimizer,
            batch.micro_batches,
            lr=lr,
            muon_beta=choose_muon_beta(run.config.optimizer, state.step, end=run.schedule.decay_steps),
            scale=runtime.world / max(counts.num_targets, 1),
            gradient_clipping=run.config.trainer.gradient_clipping,
            judge=partial(run.guard.judge, num_targets=counts.num_targets),
            no_sync=lambda: run.engine.keep_gradients(runtime, run.model),
            reduce=runtime.average_on_device if run.config.trainer.bf16_residual else None,
            observe=observe,
        )
    state = replace(
        state,
        step=state.step + 1,
        tokens=state.tokens + counts.num_tokens,
        targets=state.targets + counts.num_targets,
        documents=state.documents + counts.num_documents,
        data=batch.state,
    )
    if run.average is not None:
        run.average.update(state.step, result.skipped)
    run.guard.add(state.step, result.skipped)
    return state, StepMetrics(
        result=result,
        row_keys=tuple(micro.row_keys for micro in batch.micro_batches),
        counts=counts,
        source_tokens=batch.source_tokens,
        digest=batch.digest,
        lr=lr,
        data_wait=data_wait,
    )
