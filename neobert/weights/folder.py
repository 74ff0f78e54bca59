"""The folder of a run: every `checkpoints/<step>/` is a complete checkpoint, and nothing else has a decimal name.

Which checkpoint is used: an explicit one is used or refused. `latest`, or the folder of a run, means the newest step
that passes the full check of its manifest; steps are compared, not times, since copies change times.

The manifest says which files belong to a checkpoint, how long they are, and what is in them:

    {"format": 1, "step": 40, "world_size": 2, "files": {"model.safetensors": {"bytes": 202808, "sha256": "..."}},
     "self": "sha256 of the rest"}

It is written last and names every file of every rank, so a folder is a checkpoint if and only if its manifest holds.
Neither safetensors nor torch notices a flipped bit in a tensor; the sums here do.
"""

import hashlib
import json
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neobert.config.nesting import parse_json
from neobert.disk import sync
from neobert.errors import UserError

MODEL_FILE, EMA_FILE = "model.safetensors", "ema.safetensors"
"""Weights of a checkpoint: those that are trained and, with `trainer.ema_decay`, their moving average."""

HEAD_FILE = "head.json"
"""What the outputs of a head mean (`ObjectiveModule.describe_head`), where there is one."""


MANIFEST = "manifest.json"
FORMAT = 1


class CheckpointError(UserError):
    """A checkpoint that cannot be trusted. The message is the reason, without the folder's name."""


class ManifestMissing(CheckpointError):
    """There is no manifest: a checkpoint of another program, or of an earlier version of this one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """What a file must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of `manifest.json`."""

    step: int
    world_size: int
    """Processes that wrote it."""

    files: dict[str, FileRecord]
    """By path below the checkpoint's folder."""

    @property
    def num_bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())

    @property
    def digest(self) -> str:
        """SHA-256 of all it says: of every file of the checkpoint."""
        return _digest(self._body())

    def to_text(self) -> str:
        """The file's text."""
        return json.dumps({**self._body(), "self": self.digest}, indent=1) + "\n"

    def _body(self) -> dict[str, Any]:
        files = {name: asdict(record) for name, record in sorted(self.files.items())}
        return {"format": FORMAT, "step": self.step, "world_size": self.world_size, "files": files}


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def record_file(path: Path) -> FileRecord:
    """Length and SHA-256 of a file on disk."""
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        return FileRecord(bytes=os.fstat(handle.fileno()).st_size, sha256=digest)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, checked against its own sum and against the folder's name.

    Raises:
        ManifestMissing: there is none.
        CheckpointError: it is torn, altered, of another format, or belongs to another step.
    """
    try:
        text = (folder / MANIFEST).read_text()
    except FileNotFoundError:
        raise ManifestMissing(f"it has no {MANIFEST}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{MANIFEST} cannot be read ({error})") from error
    try:
        body = parse_json(text)
        own = body.pop("self")
        if body["format"] != FORMAT:
            raise CheckpointError(f"{MANIFEST} has format {body['format']!r}, this code reads {FORMAT}")
        files = {name: FileRecord(**record) for name, record in body["files"].items()}
        manifest = Manifest(step=body["step"], world_size=body["world_size"], files=files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST} is torn or altered ({len(text)} characters, {error!r})") from error
    if own != _digest(body):
        raise CheckpointError(f"{MANIFEST} is altered: its own sha256 does not match")
    if is_step_name(folder.name) and manifest.step != int(folder.name):
        raise CheckpointError(f"{MANIFEST} is that of step {manifest.step}")
    return manifest


def write_manifest(folder: Path, step: int) -> None:
    """Flushes every file of a folder that one process wrote, and writes its manifest last."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        sync(path)
    records = {path.relative_to(folder).as_posix(): record_file(path) for path in files}
    (folder / MANIFEST).write_text(Manifest(step=step, world_size=1, files=records).to_text())
    sync(folder / MANIFEST)


def is_step_name(name: str) -> bool:
    """Whether a folder's name is a plain step number: `40`, not `040`."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def check_sizes(folder: Path) -> Manifest:
    """The cheap check: the manifest holds and every file has the length it names.

    Raises:
        CheckpointError: with the file and both lengths.
    """
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            raise CheckpointError(f"{name} is missing") from None
        if size != record.bytes:
            cause = "power loss or disk full" if size == 0 else "truncated write or disk full"
            raise CheckpointError(f"{name} is {size} bytes, {MANIFEST} says {record.bytes} ({cause})")
    return manifest


def check_contents(folder: Path) -> Manifest:
    """The full check: `check_sizes`, and the SHA-256 of every file. Reads everything once, about 1 GB/s.

    Raises:
        CheckpointError: with the file that differs.
    """
    manifest = check_sizes(folder)
    for name, record in manifest.files.items():
        try:
            found = record_file(folder / name)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read ({error})") from error
        if found.sha256 != record.sha256:
            raise CheckpointError(
                f"{name} does not match its sha256 in {MANIFEST} (a changed bit): "
                f"{found.sha256[:12]}... instead of {record.sha256[:12]}..."
            )
    return manifest


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
