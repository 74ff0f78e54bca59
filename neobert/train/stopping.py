"""The end of a run that stops before its budget is spent: one checkpoint, or none when the numbers are bad."""

import time

from neobert.train.checkpoint import complete_save, save_checkpoint
from neobert.train.lock import release_lock
from neobert.train.run import Run
from neobert.types import TrainState


def stop_early(run: Run, state: TrainState) -> None:
    """Saves, says how to go on, and closes the run."""
    if run.stop.reason == "numbers":
        _report_numbers(run, state)
    else:
        _save_and_report(run, state)
    run.tracker.close()
    run.reporter.close()
    if run.runtime.is_main:
        release_lock(run.output_dir)
    run.runtime.close()


def _save_and_report(run: Run, state: TrainState) -> None:
    cause = run.stop.signal_name or "a signal to another process"
    if run.stop.reason == "out_of_time":
        cause = f"trainer.max_hours: {run.config.trainer.max_hours}"
    run.tracker.say(f"preempt: {cause}: stopping after step {state.step}")
    if state.step == 0:
        run.tracker.say("preempt: no step was made, there is nothing to save")
        return
    start = time.perf_counter()
    saved = save_checkpoint(run, state, wait=True)
    seconds = time.perf_counter() - start
    run.tracker.event("stopped", state.step, reason=run.stop.reason, cause=cause, seconds=seconds)
    if saved is None:
        run.tracker.warn(f"preempt: stopped at step {state.step} without a checkpoint")
        return
    run.tracker.say(
        f"preempt: saved step {state.step} in {seconds:.1f} s; go on with --trainer.resume_from_checkpoint latest"
    )


def _report_numbers(run: Run, state: TrainState) -> None:
    complete_save(run, wait=True)  # Of a good step, begun before.
    verdict, first_step = run.guard.verdict, run.guard.first_skipped
    run.tracker.flush()
    first = next((x for x in run.tracker.skipped if first_step is not None and x.step >= first_step), None)
    run.tracker.event("numbers", state.step, verdict=verdict, rows=None if first is None else first.rows)
    run.tracker.warn(
        f"{verdict}. The run stops and saves nothing. "
        + ("" if first is None else f"The first: {first.describe()}. ")
        + "The newest checkpoint is good: go on from it with a lower optimizer.lr, with trainer.rollback_steps to pass "
        "over these rows, or with trainer.detect_anomaly: true to find the operation"
    )
