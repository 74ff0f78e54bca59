"""The end of a run: the last evaluation and checkpoint, a few completed texts, and what to type next."""

import shlex
from collections.abc import Callable

import torch

from neobert.data.loader import merge_states
from neobert.data.pipeline import DataPipeline
from neobert.inference.fill_mask import FilledText, fill_beginnings, fill_mask
from neobert.train.checkpoint import save_checkpoint
from neobert.train.evaluate import evaluate, log_evaluation
from neobert.train.lock import release_lock
from neobert.train.metrics import Evaluation
from neobert.train.run import Run
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
        f'python scripts/predict.py {folder} "The capital of France is [MASK]."',
        f"python scripts/pretraining/pretrain.py {shlex.quote(str(run.output_dir / 'config.yaml'))} "
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
