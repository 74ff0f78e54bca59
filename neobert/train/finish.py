"""The end of a run: the last evaluation and checkpoint, a few completed texts, and what to type next.

A run that stops before its budget is spent saves one checkpoint, or none when the numbers are bad.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from neobert.data.rows.loader import merge_states
from neobert.inference.model import Model
from neobert.objectives.base import Answer, Answers
from neobert.objectives.table import load_part
from neobert.train.checkpoint.save import complete_save, note_bad_records, save_checkpoint
from neobert.train.pretraining import SHOWN, log_evaluation, look_at_health
from neobert.train.probes.probing import log_probes, probing_missing
from neobert.train.report.page import REPORT
from neobert.train.report.run_summary import show_seconds
from neobert.train.run import Run
from neobert.train.start import release_lock
from neobert.types import TrainState

DESCRIPTION = "{bad} bad records, {skipped} without text, {dropped} pieces shorter than dataset.min_length"


def _answer(run: Run, model: Model) -> Sequence[Answer]:
    """What the model says of `trainer.fill_mask_texts`, or else of what its job shows."""
    texts = run.config.trainer.fill_mask_texts
    if texts is None:
        return run.job.show(run, model)
    answers: Answers = load_part(run.objective.answers)
    return answers.answer(model, texts, top_k=SHOWN, joint=False)


def finish(run: Run, state: TrainState) -> None:
    """Brings the record up to `state`, unless this step was evaluated and saved already, and closes the run."""
    if run.logging_steps:
        run.tracker.log(state, run.read_metrics())
        look_at_health(run, state)
    if run.checkpoint is not None and not run.tracker.trained:
        run.tracker.say(f"nothing left to do: step {state.step:,} of {run.num_steps:,}")
    elif not run.tracker.evaluated(state.step):
        log_evaluation(run, state)
    if run.tracker.trained and probing_missing(run, state):
        log_probes(run, state)
    states = run.runtime.gather_to_main(state.data)
    if states is not None:
        skipped = run.data.counters(merge_states(states))
        if any(skipped.values()):
            run.tracker.say(f"skipped: {DESCRIPTION.format(**skipped)}")
        note_bad_records(run, state, skipped)
    saved = save_checkpoint(run, state, wait=True)
    answered: Sequence[Answer] = []
    if run.config.trainer.fill_mask_texts != ():
        model = run.as_model(main_only=True)
        with torch.compiler.set_stance("force_eager"):  # A few texts are not worth a compilation for their length.
            answered = _answer(run, model) if run.runtime.is_main else []
    if answered:
        run.tracker.say("\n".join(["predictions:", *(text.describe() for text in answered)]))
    if run.tracker.trained and run.runtime.is_main:
        run.tracker.say(describe_end(run, state, saved))
    commands: list[str] = []
    if saved is not None:
        commands = run.job.next_commands(run)
        run.tracker.say("\n  ".join(["next:", *commands]))
    run.tracker.event("finished", state.step, saved=saved is not None, next=commands)
    run.tracker.close()
    if (run.output_dir / REPORT).is_file():
        run.tracker.say(f"report: {run.output_dir / REPORT}")
    if run.runtime.is_main:
        release_lock(run.output_dir)
    run.runtime.close()


def describe_end(run: Run, state: TrainState, saved: Path | None) -> str:
    """How far the run is, how long this start took, what was learned, and where it is."""
    checkpoint = [] if saved is None else [f"checkpoints/{saved.name}"]
    there = [str(name) for name in (REPORT, "log.jsonl", "training.log") if (run.output_dir / name).exists()]
    learned = run.tracker.describe_learning()
    return "\n".join(
        [
            f"finished  step {state.step:,} of {run.num_steps:,}; this start took {show_seconds(run.reporter.seconds)}",
            *([f"learned   {learned}"] if learned else []),
            f"files     {run.output_dir}/: {', '.join([*checkpoint, *there])}",
        ]
    )


def stop_early(run: Run, state: TrainState) -> None:
    """Saves, says how to continue, and closes the run."""
    if run.stop.reason == "numbers":
        _report_numbers(run, state)
    else:
        _save_and_report(run, state)
    run.tracker.close()
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
        f"preempt: saved step {state.step} in {seconds:.1f} s; continue with --trainer.resume_from_checkpoint latest"
    )


def _report_numbers(run: Run, state: TrainState) -> None:
    complete_save(run, wait=True)  # Of a good step, started before.
    verdict, first_step = run.guard.verdict, run.guard.first_skipped
    run.tracker.flush()
    first = next((x for x in run.tracker.skipped if first_step is not None and x.step >= first_step), None)
    run.tracker.event("numbers", state.step, verdict=verdict, rows=None if first is None else first.rows)
    run.tracker.warn(
        f"{verdict}. The run stops and saves nothing. "
        + ("" if first is None else f"The first: {first.describe()}. ")
        + "The newest checkpoint is good: continue from it with a lower optimizer.lr, with trainer.rollback_steps to "
        "skip these rows, or with trainer.detect_anomaly: true to find the operation"
    )
