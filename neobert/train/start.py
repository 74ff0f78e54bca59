"""Before a run touches anything: what its output folder holds, and which checkpoint it continues from.

One run in an output folder at a time, and one folder for all ranks.

The lock is on `<output_dir>/.lock`, held by rank 0: a resume after a crash never waits for a stale one (`disk.py`).
"""

import os
import secrets
import shutil
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neobert.config.fields import FIELDS, SECTIONS
from neobert.config.load import ConfigError, config_to_yaml, load_saved_config, saved_text
from neobert.config.nesting import parse_json
from neobert.config.schema import Config
from neobert.disk import is_locked_by, lock_file, replacing
from neobert.errors import StartupError
from neobert.key import show_value
from neobert.train.checkpoint.run_folder import (
    check_output_dir,
    check_own,
    check_unused,
    free_names,
    holds_run,
    set_aside,
)
from neobert.train.processes.agreement import RankError, agree, exchange
from neobert.weights.folder import (
    AVERAGE_FILE,
    CheckpointError,
    Choice,
    checkpoint_steps,
    choose_checkpoint,
    choose_newest,
)

if TYPE_CHECKING:
    from neobert.train.hardware.machine import Runtime
    from neobert.train.record.console import Reporter

LOCK = ".lock"
VISIBLE_SECONDS = 10.0
"""Network file systems show a new file to other nodes after a few seconds."""

_held: dict[Path, int] = {}
# By folder: a start that fails leaves its lock after, and the next start of the same process takes it over.


def acquire_lock(output_dir: Path) -> None:
    """Takes the lock of an existing folder for the rest of this process, or until `release_lock`.

    Raises:
        StartupError: another process holds it; with its pid and host.
    """
    path, held = output_dir / LOCK, _held.get(output_dir.absolute())
    if held is not None and is_locked_by(held, path):
        return
    release_lock(output_dir)  # Of a folder that is gone, or was renamed.
    try:
        _held[output_dir.absolute()] = lock_file(path)
    except BlockingIOError as holder:
        raise StartupError(
            f"trainer.output_dir: another run is writing into {output_dir} ({holder}); wait for it, stop it, or choose "
            "another trainer.output_dir"
        ) from None


def release_lock(output_dir: Path) -> None:
    """Gives the lock back; nothing where this process holds none."""
    descriptor = _held.pop(output_dir.absolute(), None)
    if descriptor is not None:
        os.close(descriptor)


def check_shared(output_dir: Path, runtime: "Runtime") -> None:
    """Raises when the ranks do not see one folder: each would keep a part of every checkpoint to itself. Collective.

    Raises:
        RankError: on every rank.
    """
    if runtime.world == 1:
        return
    name = f".shared-{secrets.token_hex(8)}"
    if runtime.is_main:
        (output_dir / name).touch()
    path = output_dir / exchange(runtime, name)[0]
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    seen = exchange(runtime, (path.exists(), socket.gethostname()))
    if runtime.is_main:
        path.unlink()
    blind = [f"rank {rank} on {host}" for rank, (exists, host) in enumerate(seen) if not exists]
    if blind:
        raise RankError(
            f"trainer.output_dir: {output_dir} is not one folder for all processes: {', '.join(blind)} cannot see what "
            "rank 0 writes; choose a folder on a file system that all nodes can see"
        )


FORMAT_VERSION = 1
"""Of `train_state.json`; a change that old checkpoints cannot follow raises it."""

SPACE_FACTOR = 2
"""Checkpoints that must fit on the disk at the start: the old one goes only when the new one is there."""


def choose_start(config: Config) -> Choice:
    """The checkpoint to continue from; its path is None for a fresh start.

    Raises:
        StartupError: the folder holds a run that the config neither resumes nor overwrites, or the named checkpoint
            is not there or damaged.
    """
    output_dir, resume = Path(config.trainer.output_dir), config.trainer.resume_from_checkpoint
    if resume is None:
        check_unused(config, "continue it with trainer.resume_from_checkpoint: latest")
        return Choice(path=None)
    try:
        if resume == "latest":
            check_own(output_dir)
            return choose_newest(output_dir)
        path = output_dir / "checkpoints" / resume if resume.isdecimal() else Path(resume)
        if resume.isdecimal() and not path.is_dir():
            there = ", ".join(map(str, checkpoint_steps(output_dir))) or "none"
            raise StartupError(
                f"trainer.resume_from_checkpoint: {resume}, but {path} is not a checkpoint; steps there: {there}"
            )
        choice = choose_checkpoint(path)
    except CheckpointError as error:
        raise StartupError(f"trainer.resume_from_checkpoint: {resume}: {error}") from error
    if choice.path is None:
        raise StartupError(
            f"trainer.resume_from_checkpoint: {resume} is neither a checkpoint folder nor a run folder that has one; "
            "give a step number, a folder, or latest"
        )
    if not is_own(choice.path, output_dir):
        check_unused(config, "continue that run with trainer.resume_from_checkpoint: latest")
    return choice


def is_own(checkpoint: Path, output_dir: Path) -> bool:
    """Whether a checkpoint is one of this output folder's."""
    return checkpoint.resolve().parent == (output_dir / "checkpoints").resolve()


def read_train_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's `train_state.json`.

    Raises:
        StartupError: the file is missing, torn, or of another format version.
    """
    path = checkpoint / "train_state.json"
    if (checkpoint / AVERAGE_FILE).is_file():
        raise StartupError(
            f"trainer.resume_from_checkpoint: {checkpoint} is a mean of checkpoints, without optimizer and position in "
            f"the data; start a run from its weights with model.init_from: {checkpoint}"
        )
    try:
        saved = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise StartupError(
            f"{path} cannot be read ({error}); choose another step with trainer.resume_from_checkpoint"
        ) from error
    if saved.get("version") != FORMAT_VERSION:
        raise StartupError(
            f"{path} has format version {saved.get('version')!r}; this code reads version {FORMAT_VERSION}, "
            "use the release that wrote it"
        )
    return saved


def read_checkpoint_config(checkpoint: Path) -> Config:
    """The config that the checkpoint's run was started with, for comparison; nothing of it takes effect.

    Raises:
        StartupError: it is missing or has keys that this version does not know.
    """
    try:
        return load_saved_config(checkpoint / "config.yaml")
    except ConfigError as error:
        raise StartupError(f"the config of {checkpoint} cannot be read: {error}") from error


def agree_on_start(config: Config, runtime: "Runtime") -> Choice:
    """`choose_start` decided by rank 0 for all ranks, under the lock of the folder and before any of them writes.

    Raises:
        StartupError: on every rank, when rank 0 cannot start.
    """

    def decide() -> Choice:
        output_dir = Path(config.trainer.output_dir)
        try:
            check_output_dir(config)
            if output_dir.is_dir():
                _lock(output_dir)
            return choose_start(config)
        except OSError as error:  # No access, a name that is too long, a disk that is gone.
            raise StartupError(f"trainer.output_dir: {output_dir} cannot be read ({error})") from error

    return agree(runtime, decide)


def _lock(output_dir: Path) -> None:
    try:
        acquire_lock(output_dir)
    except OSError as error:
        raise StartupError(
            f"trainer.output_dir: {output_dir} cannot be written ({error}); correct its permissions or choose another"
        ) from error


def open_output_dir(config: Config, runtime: "Runtime", reporter: "Reporter", start: Choice) -> Path:
    """Makes the output folder ready for this start and says what was found there.

    Raises:
        StartupError: on every rank: it cannot be written, another run is there, or it is not one folder for all ranks.
    """
    output_dir, trainer = Path(config.trainer.output_dir), config.trainer

    def prepare() -> None:
        elsewhere = start.path is not None and not is_own(start.path, output_dir)
        if (trainer.resume_from_checkpoint is None or elsewhere) and holds_run(output_dir):
            aside = set_aside(output_dir, config)
            release_lock(output_dir)
            reporter.say(f"trainer.overwrite_output_dir: the old run is now {aside}/")
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            there = "a link that leads nowhere" if os.path.islink(output_dir) else "a file"
            why = f"there is {there} of this name" if isinstance(error, FileExistsError) else error
            raise StartupError(f"trainer.output_dir: {output_dir} cannot be made ({why})") from error
        _lock(output_dir)
        reporter.open_file(output_dir / "training.log")
        for note in start.notes:
            reporter.warn(note)
        if start.path is not None:
            reporter.say(f"resuming from {start.path}/")
        elif trainer.resume_from_checkpoint is not None:
            reporter.say(f"no checkpoint in {output_dir}/checkpoints/ yet: starting fresh")
        describe_config(reporter, config)

    agree(runtime, prepare)
    check_shared(output_dir, runtime)
    return output_dir


def check_free_space(output_dir: Path, checkpoint_bytes: int) -> None:
    """Raises when the disk has no room for two checkpoints.

    Raises:
        StartupError: with the path, the need and what is free.
    """
    free = shutil.disk_usage(output_dir).free
    need = SPACE_FACTOR * checkpoint_bytes
    if free < need:
        raise StartupError(
            f"trainer.output_dir: the disk of {output_dir} has {free:,} bytes free, and checkpoints of about "
            f"{checkpoint_bytes:,} bytes need {need:,} (the old one is deleted when the new one is complete); free "
            "some space, choose another trainer.output_dir, or set trainer.save_model: false"
        )


def describe_config(reporter: "Reporter", config: Config) -> None:
    """Prints every setting that is not null, one line a section; of a section in a section what is not the default.
    On a terminal what differs from the defaults, as a table."""
    lines: dict[str, list[str]] = {"": [], **{name: [] for name in SECTIONS if "." not in name}}
    unused = set() if config.scheduler.warmup_percent is None else {"scheduler.warmup_steps"}
    from neobert.objectives.table import OBJECTIVES, choose_objective  # Needs torch, unlike a pipeline's plan.

    objective = choose_objective(config)
    for other in OBJECTIVES.values():
        if other.section not in (None, objective.section):  # Nothing of it takes effect.
            lines.pop(other.section, None)
    if objective.reads != "pairs":
        unused |= set() if config.dataset.path is None else {"dataset.name"}
    for key, field in FIELDS.items():
        section, _, name = key.partition(".")
        if section not in lines and name:
            continue
        value = field.value_in(config)
        if key in unused:
            continue
        if value not in (None, ()) and ("." not in name or value != field.default):
            lines[section if name else ""].append(f"{name or key}={value}")
    changed: dict[str, dict[str, str]] = {}
    for key, field in FIELDS.items():
        if (value := field.value_in(config)) != field.default:
            section, _, name = key.rpartition(".")
            changed.setdefault(section or "run", {})[name] = show_value(value)
    reporter.show_settings([f"[{section or 'run'}] {' '.join(x)}" for section, x in lines.items()], changed)


def write_config(config: Config, runtime: "Runtime", output_dir: Path, reporter: "Reporter") -> None:
    """Writes `config.yaml`, when everything was built: a start that failed leaves no trace of a run.

    A file of this name that a run did not write, as the config that somebody has typed, is kept under another name.
    """
    if not runtime.is_main:
        return
    path = output_dir / "config.yaml"
    with replacing(path) as temporary:
        temporary.write_text(saved_text(config), encoding="utf-8")
        if os.path.lexists(path) and not _was_written(path):
            kept = next(free_names(output_dir / "config.yaml.old"))
            path.rename(kept)
            reporter.say(f"{path} was written by hand, or by another version: it is now {kept}")


def _was_written(path: Path) -> bool:
    """Whether `path` is what `write_config` makes of the config in it."""
    try:
        return path.read_text(encoding="utf-8") == config_to_yaml(load_saved_config(path))
    except (ConfigError, OSError, ValueError):
        return False
