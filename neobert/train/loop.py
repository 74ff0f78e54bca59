"""The training loop: `pretrain` is the whole story on one screen, `training_steps` turns batches into steps."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from neobert.config.schema import Config
from neobert.data.order import step_seed
from neobert.testing.faults import fault_point
from neobert.train.checkpoint import complete_save, save_checkpoint, save_is_due
from neobert.train.evaluate import evaluate
from neobert.train.finish import finish
from neobert.train.identity import as_int64, check_next_batch
from neobert.train.report import announce
from neobert.train.resume import resume_or_start
from neobert.train.run import Run, build_run
from neobert.train.step import train_step
from neobert.types import StepMetrics, TrainState


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How a run ended."""

    state: TrainState
    reason: str
    """`finished`: the budget is spent; `complete`: it was spent before this start; `disk`: checkpoints cannot be
    written."""


def due(step: int, every: int) -> bool:
    """Whether an interval ends at this step; 0 means never."""
    return every > 0 and step % every == 0


def pretrain(config: Config) -> RunResult:
    """Trains until the budget is spent: build, announce, resume, then step, log, evaluate and save when due."""
    run = build_run(config)
    announce(run)
    state = resume_or_start(run)
    reason = "finished" if state.step < run.num_steps else "complete"
    if state.step == 0 and run.eval_steps:
        run.tracker.log_eval(state, evaluate(run))
    for state, metrics in training_steps(run, state):  # noqa: B020 (the generator takes the first state only)
        run.tracker.add(state, metrics)
        if due(state.step, run.logging_steps):
            run.tracker.log(state)
        if due(state.step, run.eval_steps):
            run.tracker.log_eval(state, evaluate(run))
        if save_is_due(run, state.step):
            save_checkpoint(run, state)
        complete_save(run)  # Of a save in the background that is written by now.
        fault_point("step.done", state.step)
        if run.committer.gave_up:
            reason = "disk"
            break
    finish(run, state)
    return RunResult(state=state, reason="disk" if run.committer.failed else reason)


def training_steps(run: Run, state: TrainState) -> Iterator[tuple[TrainState, StepMetrics]]:
    """Yields the state and the figures after every optimizer step, from `state` to the end of the budget.

    Everything a step depends on is a function of its number: the rows (loader state), their masks, the learning rate
    and the seed of the dropout masks. Hence a run continued from a checkpoint repeats the uninterrupted one.
    """
    if state.step >= run.num_steps:
        return
    runtime, trainer = run.runtime, run.config.trainer
    loader = run.data.loader(state.data or None)
    expected: str | None = state.data.get("next_batch_digest")
    try:
        while state.step < run.num_steps:
            start = time.perf_counter()
            batch = next(loader)
            data_wait = time.perf_counter() - start
            if expected is not None:
                check_next_batch(expected, runtime.sum_on_host([as_int64(batch.digest)])[0])
                expected = None
            num_targets, num_tokens, num_documents, num_slots, attended = runtime.sum_on_host(
                [batch.num_targets, batch.num_tokens, batch.num_documents, batch.num_slots, batch.attended_tokens]
            )
            torch.manual_seed(step_seed(run.config.seed, state.step, runtime.rank))
            lr = run.schedule(state.step)
            result = train_step(
                run.model,
                run.optimizer,
                [micro.to(runtime.device, non_blocking=True) for micro in batch.micro_batches],
                lr=lr,
                scale=runtime.world / max(num_targets, 1),
                gradient_clipping=trainer.gradient_clipping,
                measure_grad_norm=trainer.log_grad_norm,
                no_sync=lambda: runtime.no_sync(run.model),
            )
            state = replace(
                state,
                step=state.step + 1,
                tokens=state.tokens + num_tokens,
                targets=state.targets + num_targets,
                documents=state.documents + num_documents,
                data=batch.state,
            )
            metrics = StepMetrics(
                loss_sum=result.loss_sum,
                num_correct=result.num_correct,
                grad_norm=result.grad_norm,
                num_targets=num_targets,
                num_tokens=num_tokens,
                num_documents=num_documents,
                num_slots=num_slots,
                attended_tokens=attended,
                digest=batch.digest,
                lr=lr,
                data_wait=data_wait,
            )
            yield state, metrics
    finally:
        loader.close()
