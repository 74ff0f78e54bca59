"""Which checkpoints stay: the newest valid ones, the milestones, and the best by their evaluation.

A folder that is not valid neither counts nor is deleted: it may be all that is left of something. Deleting starts with
a rename to `.trash-<step>-<nonce>`, since a kill in the middle must not leave half a checkpoint under a valid name.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from neobert.config.fields import FIELDS
from neobert.config.nesting import parse_json
from neobert.config.schema import Config
from neobert.config.schema_trainer import TrainerSection
from neobert.disk import write_text
from neobert.testing.faults import fault_point
from neobert.train.checkpoint.commit import remove_tree
from neobert.weights.folder import valid_steps

BEST = "best.json"

_TEST = (
    "trainer.eval_seed",
    "datacollator.eval_mlm_probability",
    "dataset.max_seq_length",
    "dataset.min_length",
    "tokenizer.truncation",
    "contrastive.sets",
    "contrastive.eval_sets",
    "contrastive.pooling",
    "contrastive.anchor_prefix",
    "contrastive.positive_prefix",
    "finetune.metric",
)
"""Keys that decide an evaluation's result beside its documents and the weights."""

_CAPPED = ("trainer.eval_max_batches", "trainer.per_device_eval_batch_size", "datacollator.pack_sequences")
"""The same where only so many batches are evaluated."""


def is_milestone(section: TrainerSection, step: int) -> bool:
    """Whether the checkpoint of this step is kept forever."""
    every = section.save_milestone_every or 0
    return step in section.save_milestone_steps or (every > 0 and step % every == 0)


def choose_removed(
    section: TrainerSection, steps: Sequence[int], best: int | None, aside: Collection[int] = ()
) -> list[int]:
    """Of valid steps in ascending order, those to delete; `aside` are the best ones of other tests."""
    newest = section.save_total_limit or 0
    if not newest:
        return []
    kept = {best, *aside} if section.save_best else set()
    return [step for step in steps[:-newest] if not is_milestone(section, step) and step not in kept]


class Score(NamedTuple):
    """The evaluation at a checkpoint's step."""

    loss: float | None
    """None when that step was not evaluated, or it is not known."""

    test: str | None
    """`name_test` of it; None where an earlier version did not write it."""

    criterion: float | None = None
    """`EvalMetrics.criterion` of it; None where that is the loss."""

    @property
    def compared(self) -> float | None:
        """The lower the better."""
        return self.loss if self.criterion is None else self.criterion


def name_test(config: Config, eval_fingerprint: str | None) -> str | None:
    """Names what is evaluated and how: losses of two evaluations can be compared when their tests have one name."""
    if eval_fingerprint is None:
        return None
    keys = _TEST if config.trainer.eval_max_batches is None else (*_TEST, *_CAPPED)
    values = [(key, repr(FIELDS[key].value_in(config))) for key in keys]
    return "sha256:" + hashlib.sha256(json.dumps([str(eval_fingerprint), values]).encode()).hexdigest()


def read_score(checkpoint: Path) -> Score:
    """What a checkpoint says of its evaluation."""
    try:
        state = parse_json((checkpoint / "train_state.json").read_text())
        return Score(state.get("eval_loss"), state.get("eval_test"), state.get("eval_criterion"))
    except (OSError, ValueError, AttributeError):
        return Score(None, None)


def choose_best(criteria: dict[int, float | None]) -> int | None:
    """The step with the best evaluation, the earlier one of two; None without any."""
    known = {step: value for step, value in criteria.items() if value is not None and value == value}
    return min(known, key=lambda step: (known[step], step)) if known else None


def list_scores(output_dir: Path, steps: Sequence[int]) -> dict[int, Score]:
    """Evaluations of a run's checkpoints by step."""
    return {step: read_score(output_dir / "checkpoints" / str(step)) for step in steps}


def choose_best_of_each(scores: dict[int, Score]) -> dict[str | None, int]:
    """The best step of every test, the test that was evaluated last at the end."""
    criteria: dict[str | None, dict[int, float | None]] = {}
    for step, score in sorted(scores.items()):
        if score.compared is not None:
            criteria[score.test] = criteria.pop(score.test, {}) | {step: score.compared}
    found = {test: choose_best(of_test) for test, of_test in criteria.items()}
    return {test: step for test, step in found.items() if step is not None}


def prune(output_dir: Path, section: TrainerSection, *, dry_run: bool = False) -> tuple[list[int], list[str]]:
    """Deletes what need not stay, and what earlier deletions left behind; rank 0 only, after a commit.

    Returns:
        The steps that are gone (that would go, with `dry_run`), and one sentence for each deletion that failed.
    """
    folder = output_dir / "checkpoints"
    steps = valid_steps(output_dir)
    scores = list_scores(output_dir, steps) if section.save_best else {}
    *aside, best = choose_best_of_each(scores).values() or (None,)
    removed = choose_removed(section, steps, best, aside)
    if dry_run:
        return removed, []
    if best is not None:
        write_text(folder / BEST, json.dumps({"step": best, "eval_loss": scores[best].loss}) + "\n")
    problems = []
    for step in removed:
        fault_point("prune.before", step)
        try:
            os.rename(folder / str(step), folder / f".trash-{step}-{secrets.token_hex(4)}")
        except OSError as error:
            problems.append(f"{folder / str(step)} could not be deleted: {error}")
        fault_point("prune.renamed", step)
    # The trash of this prune, and of earlier ones that were killed or failed.
    problems += [p for p in map(remove_tree, sorted(folder.glob(".trash-*"))) if p is not None]
    return removed, problems
