"""The folder of a run: every `checkpoints/<step>/` is a complete checkpoint, and nothing else has a decimal name.

Which checkpoint is used: an explicit one is used or refused. `latest`, or the folder of a run, means the newest step
that passes the full check of its manifest; steps are compared, not times, since copies change times.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

from neobert.weights.manifest import CheckpointError, ManifestMissing, check_contents, check_sizes, is_step_name

MODEL_FILE, EMA_FILE = "model.safetensors", "ema.safetensors"
"""Weights of a checkpoint: those that are trained and, with `trainer.ema_decay`, their moving average."""

STEPS_KEY = "pretraining_steps"
"""In config.json of models that we export: a second key in the header of the weights would make its bytes random."""

OBJECTIVE_KEY = "pretraining_objective"
"""The same for what a model was trained for, where it fills no masks."""

AVERAGE_FILE = "average.json"
"""What the mean of several checkpoints was made of; in a folder of such a mean only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A checkpoint that was chosen."""

    path: Path | None
    """None: the folder has no checkpoint at all."""

    notes: tuple[str, ...] = ()
    """What was skipped and why, one sentence each."""


def checkpoint_steps(output_dir: Path) -> list[int]:
    """Steps that have a folder, ascending. Only folders with plain decimal names count."""
    folder = output_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if is_step_name(p.name) and p.is_dir())


def valid_steps(output_dir: Path) -> list[int]:
    """Steps whose manifest and file lengths hold, ascending."""
    return [step for step in checkpoint_steps(output_dir) if is_valid(output_dir / "checkpoints" / str(step))]


def is_valid(folder: Path) -> bool:
    """Whether a checkpoint's manifest and file lengths hold."""
    try:
        check_sizes(folder)
    except CheckpointError:
        return False
    return True


def choose_newest(output_dir: Path) -> Choice:
    """The newest valid checkpoint of a run.

    Raises:
        CheckpointError: there are checkpoints and none of them is valid; the message lists the reasons.
    """
    notes: list[str] = []
    steps = checkpoint_steps(output_dir)
    for step in reversed(steps):
        folder = output_dir / "checkpoints" / str(step)
        try:
            check_contents(folder)
        except CheckpointError as error:
            notes.append(f"checkpoint {folder} skipped: {error}")
        else:
            return Choice(path=folder, notes=tuple(notes))
    if steps:
        raise CheckpointError(
            f"{output_dir} has {len(steps)} checkpoint(s) and none is valid:\n  "
            + "\n  ".join(notes)
            + "\nname a step or a path to load one without manifest.json, or start a new trainer.output_dir"
        )
    return Choice(path=None)


def choose_checkpoint(path: Path) -> Choice:
    """The checkpoint that `path` means: itself, or the newest valid one of a run folder or a `checkpoints` folder.

    A checkpoint without a manifest is used when it is named itself, with a note.

    Raises:
        CheckpointError: the named checkpoint is damaged, or a run has none that is valid.
    """
    if not (path / "train_state.json").is_file() and not (path / "manifest.json").is_file():
        if is_step_name(path.name) and path.parent.name == "checkpoints" and path.is_dir():
            raise CheckpointError(f"{path} is damaged: it has neither manifest.json nor train_state.json")
        return choose_newest(path.parent if path.name == "checkpoints" else path)
    try:
        check_contents(path)
    except ManifestMissing:
        note = f"{path} has no manifest.json, so nothing shows whether its files are whole; it is loaded as it is"
        return Choice(path=path, notes=(note,))
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is damaged: {error}; choose another step, or latest for the newest one that is whole"
        ) from error
    return Choice(path=path)


def find_checkpoint(path: Path) -> Path | None:
    """`choose_checkpoint` for those who only need the folder: what it has to say becomes warnings.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    """
    choice = choose_checkpoint(path)
    for note in choice.notes:
        warnings.warn(note, stacklevel=3)
    return choice.path
