"""Before a run touches anything: what its output folder holds, and which checkpoint it continues from."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from neobert.config.load import config_to_yaml
from neobert.config.schema import Config
from neobert.train.console import Reporter
from neobert.train.runtime import Runtime, StartupError
from neobert.weights.folder import checkpoint_steps, find_checkpoint

FORMAT_VERSION = 1
"""Of `train_state.json`; a change that old checkpoints cannot follow raises it."""


def choose_start(config: Config) -> Path | None:
    """The checkpoint to continue from, or None for a fresh start.

    Raises:
        StartupError: the folder holds a run and the config neither resumes nor overwrites it, or the named checkpoint
            is not there.
    """
    output_dir, resume = Path(config.trainer.output_dir), config.trainer.resume_from_checkpoint
    if resume is None:
        if holds_run(output_dir) and not config.trainer.overwrite_output_dir:
            raise StartupError(
                f"trainer.output_dir: {output_dir} already holds a run; continue it with "
                "trainer.resume_from_checkpoint: latest, or set trainer.overwrite_output_dir: true to start anew "
                "(the old run is kept beside it under another name), or choose another trainer.output_dir"
            )
        return None
    if resume == "latest":
        return find_checkpoint(output_dir)
    if resume.isdecimal():
        path = output_dir / "checkpoints" / resume
        if not (path / "train_state.json").is_file():
            there = ", ".join(map(str, checkpoint_steps(output_dir))) or "none"
            raise StartupError(
                f"trainer.resume_from_checkpoint: {resume}, but {path} is not a checkpoint; steps there: {there}"
            )
        return path
    found = find_checkpoint(Path(resume))
    if found is None:
        raise StartupError(
            f"trainer.resume_from_checkpoint: {resume} is neither a checkpoint folder nor a run folder that has one; "
            "give a step number, a folder, or latest"
        )
    return found


def holds_run(output_dir: Path) -> bool:
    """Whether a run has written into this folder."""
    return any((output_dir / name).exists() for name in ("log.jsonl", "checkpoints"))


def set_aside(output_dir: Path) -> Path:
    """Renames a used output folder, so that overwriting loses nothing; returns its new name."""
    number = 1
    while (aside := output_dir.with_name(f"{output_dir.name}.old-{number}")).exists():
        number += 1
    output_dir.rename(aside)
    return aside


def read_train_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's `train_state.json`.

    Raises:
        StartupError: the file is missing, torn, or of another format version.
    """
    path = checkpoint / "train_state.json"
    try:
        saved = json.loads(path.read_text())
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


def agree_on_start(config: Config, runtime: Runtime) -> Path | None:
    """`choose_start` decided by rank 0 for all ranks, before any of them writes.

    Raises:
        StartupError: on every rank, when rank 0 cannot start.
    """
    answer: tuple[Path | None, str | None] = (None, None)
    if runtime.is_main:
        try:
            answer = (choose_start(config), None)
        except StartupError as error:
            answer = (None, str(error))
    checkpoint, problem = runtime.gather_objects(answer)[0]
    if problem is not None:
        raise StartupError(problem)
    return checkpoint


def open_output_dir(config: Config, runtime: Runtime, reporter: Reporter, checkpoint: Path | None) -> Path:
    """Makes the output folder ready for this start and says what was found there."""
    output_dir, trainer = Path(config.trainer.output_dir), config.trainer
    if runtime.is_main:
        if trainer.resume_from_checkpoint is None and holds_run(output_dir):
            aside = set_aside(output_dir)
            reporter.say(f"trainer.overwrite_output_dir: the old run is now {aside}/")
        output_dir.mkdir(parents=True, exist_ok=True)
        reporter.open_file(output_dir / "training.log")
        if checkpoint is not None:
            reporter.say(f"resuming from {checkpoint}/")
        elif trainer.resume_from_checkpoint is not None:
            reporter.say(f"no checkpoint in {output_dir}/checkpoints/ yet: starting fresh")
        describe_config(reporter, config)
    runtime.barrier()
    return output_dir


def describe_config(reporter: Reporter, config: Config) -> None:
    """Prints every setting that is not null, one line a section."""
    lines = [f"[run] task={config.task} seed={config.seed}"]
    for section in dataclasses.fields(config):
        value: Any = getattr(config, section.name)
        if dataclasses.is_dataclass(value):
            pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
            lines.append(f"[{section.name}] " + " ".join(f"{k}={v}" for k, v in pairs if v not in (None, ())))
    reporter.say("\n".join(lines), style="dim")


def write_config(config: Config, runtime: Runtime, output_dir: Path) -> None:
    """Writes `config.yaml`, when everything was built: a start that failed leaves no trace of a run."""
    if runtime.is_main:
        temporary = output_dir / ".config.yaml.tmp"
        temporary.write_text(config_to_yaml(config))
        temporary.replace(output_dir / "config.yaml")
