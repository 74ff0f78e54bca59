"""The end of a run: the last evaluation and checkpoint, a few completed texts, and what to type next.

The end of a run that stops before its budget is spent: one checkpoint, or none when the numbers are bad.
"""

import shlex
import time
from collections.abc import Callable

import torch

from neobert.data.pipeline import DataPipeline
from neobert.data.rows.loader import merge_states
from neobert.inference.fill_mask import FilledText, fill_beginnings, fill_mask
from neobert.train.checkpoint.save import complete_save, save_checkpoint
from neobert.train.pretraining import evaluate, log_evaluation
from neobert.train.record.metrics import Evaluation
from neobert.train.run import Run
from neobert.train.start import release_lock
from neobert.types import TrainState

DESCRIPTION = "{bad} bad records, {skipped} without text, {dropped} pieces shorter than dataset.min_length"

SHOWN = 3
"""Guesses shown for each mask."""

NUM_TEXTS = 4
"""Evaluation documents that are shown with a mask."""


def pretraining_commands(run: Run) -> list[str]:
    """What to type after pretraining."""
    folder = shlex.quote(str(run.output_dir))
    return [
        f'neobert predict {folder} "The capital of France is [MASK]."',
        f"neobert pretrain {shlex.quote(str(run.output_dir / 'config.yaml'))} "
        f"--trainer.resume_from_checkpoint latest --trainer.max_steps {2 * run.num_steps}",
    ]


def _predict(run: Run) -> list[FilledText]:
    """Guesses for the masks of `trainer.fill_mask_texts`, or in the evaluation documents."""
    texts = run.config.trainer.fill_mask_texts
    if texts is not None:
        return fill_mask(run.module, run.tokenizer, texts, top_k=SHOWN)
    if not isinstance(run.data, DataPipeline) or run.data.eval_set is None:
        return []
    documents = run.data.eval_set.documents()
    return fill_beginnings(run.module, run.tokenizer, documents, num_texts=NUM_TEXTS, top_k=SHOWN)


def finish(
    run: Run,
    state: TrainState,
    *,
    evaluate: Callable[[Run], Evaluation | None] = evaluate,
    next_commands: Callable[[Run], list[str]] = pretraining_commands,
) -> None:
    """Brings the record up to `state`, unless this step was evaluated and saved already, and closes the run."""
    if run.logging_steps:
        run.tracker.log(state, run.read_figures())
    if run.checkpoint is not None and not run.tracker.trained:
        run.tracker.say(f"nothing left to do: step {state.step:,} of {run.num_steps:,}")
    elif not run.tracker.evaluated(state.step):
        log_evaluation(run, state, evaluate)
    passed_over = run.data.counters(merge_states(run.runtime.gather_objects(state.data)))
    if any(passed_over.values()):
        run.tracker.say(f"passed over: {DESCRIPTION.format(**passed_over)}")
    saved = save_checkpoint(run, state, wait=True)
    with torch.compiler.set_stance("force_eager"):  # A few texts are not worth a compilation for their length.
        filled = _predict(run) if run.runtime.is_main else []
    if filled:
        run.tracker.say("\n".join(["predictions:", *(text.describe() for text in filled)]))
    if saved is not None:
        run.tracker.say("\n  ".join(["next:", *next_commands(run)]))
    run.tracker.close()
    run.reporter.close()
    if run.runtime.is_main:
        release_lock(run.output_dir)
    run.runtime.close()


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
