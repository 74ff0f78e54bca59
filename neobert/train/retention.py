"""Which checkpoints stay: the newest valid ones, the milestones, and the best by evaluation loss.

A folder that is not valid neither counts nor is deleted: it may be all that is left of something. Deleting begins with
a rename to `.trash-<step>-<nonce>`, since a kill in the middle must not leave half a checkpoint under a valid name.
"""

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neobert.config.schema import Config
from neobert.testing.faults import fault_point
from neobert.train.commit import remove_tree
from neobert.weights.folder import valid_steps

BEST = "best.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """What is kept."""

    newest: int
    """Number of newest checkpoints; 0 keeps all."""

    milestones: tuple[int, ...]
    every: int
    """Steps that are multiples of this are kept for ever; 0: none."""

    best: bool

    def is_milestone(self, step: int) -> bool:
        return step in self.milestones or (self.every > 0 and step % self.every == 0)

    def choose_removed(self, steps: Sequence[int], best: int | None) -> list[int]:
        """Of valid steps in ascending order, those to delete."""
        if not self.newest:
            return []
        return [s for s in steps[: -self.newest] if not self.is_milestone(s) and s != (best if self.best else None)]


def build_retention(config: Config) -> Retention:
    """From `trainer.save_total_limit`, `save_milestone_steps`, `save_milestone_every`, `save_best`."""
    trainer = config.trainer
    return Retention(
        newest=trainer.save_total_limit or 0,
        milestones=trainer.save_milestone_steps,
        every=trainer.save_milestone_every or 0,
        best=trainer.save_best,
    )


def read_eval_loss(checkpoint: Path) -> float | None:
    """Evaluation loss at the checkpoint's step; None when that step was not evaluated, or it is not known."""
    try:
        return json.loads((checkpoint / "train_state.json").read_text()).get("eval_loss")
    except (OSError, ValueError, AttributeError):
        return None


def choose_best(losses: dict[int, float | None]) -> int | None:
    """The step with the lowest evaluation loss, the earlier one of two; None without any."""
    known = {step: loss for step, loss in losses.items() if loss is not None and loss == loss}
    return min(known, key=lambda step: (known[step], step)) if known else None


def list_eval_losses(output_dir: Path, steps: Sequence[int]) -> dict[int, float | None]:
    """Evaluation losses of a run's checkpoints by step."""
    return {step: read_eval_loss(output_dir / "checkpoints" / str(step)) for step in steps}


def prune(output_dir: Path, retention: Retention, *, dry_run: bool = False) -> tuple[list[int], list[str]]:
    """Deletes what need not stay, and what earlier deletions left behind; rank 0 only, after a commit.

    Returns:
        The steps that are gone (that would go, with `dry_run`), and one sentence for each deletion that failed.
    """
    folder = output_dir / "checkpoints"
    steps = valid_steps(output_dir)
    losses = list_eval_losses(output_dir, steps) if retention.best else {}
    best = choose_best(losses)
    removed = retention.choose_removed(steps, best)
    if dry_run:
        return removed, []
    if best is not None:
        temporary = folder / ".best.json.tmp"
        temporary.write_text(json.dumps({"step": best, "eval_loss": losses[best]}) + "\n")
        os.replace(temporary, folder / BEST)
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
