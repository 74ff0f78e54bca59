"""Questions about the checkpoints of a run, answered from the disk: verify, list, diff, prune."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neobert.config.load import ConfigError
from neobert.config.schema_trainer import TrainerSection
from neobert.errors import StartupError
from neobert.train.checkpoint.identity import Facts, compare
from neobert.train.checkpoint.resume import describe_saved_run
from neobert.train.checkpoint.retention import (
    choose_best_of_each,
    is_milestone,
    list_scores,
    prune,
    read_score,
)
from neobert.train.start import acquire_lock, read_checkpoint_config, read_train_state, release_lock
from neobert.weights.folder import (
    CheckpointError,
    check_contents,
    check_sizes,
    checkpoint_steps,
    choose_checkpoint,
    valid_steps,
)


def verify_run(run: Path) -> tuple[list[str], bool]:
    """One line for each checkpoint of a run, or for the one checkpoint that `run` is; whether all of them are whole.

    Every file is read and its SHA-256 compared.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    folders = _folders(run)
    lines, whole = [], True
    for folder in folders:
        try:
            manifest = check_contents(folder)
            lines.append(f"{folder.name}: whole, {len(manifest.files)} files, {manifest.num_bytes:,} bytes")
        except CheckpointError as error:
            lines.append(f"{folder.name}: DAMAGED, {error}")
            whole = False
    return lines, whole


def _folders(run: Path) -> list[Path]:
    steps = checkpoint_steps(run)
    if steps:
        return [run / "checkpoints" / str(step) for step in steps]
    path = choose_checkpoint(run).path
    if path is None:
        raise CheckpointError(f"{run} holds no checkpoint; give a run folder, or one of its checkpoints")
    return [path]


def list_run(run: Path, now: float) -> list[str]:
    """A table of a run's checkpoints: step, size, age, evaluation loss, and why it stays.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    folders = _folders(run)
    section = _read_section(folders[-1])
    *aside, best = choose_best_of_each(list_scores(run, valid_steps(run))).values() or (None,)
    lines = [f"{'step':>10} {'MB':>10} {'age':>8} {'eval loss':>10}  notes"]
    for folder in folders:
        try:
            size, notes = f"{check_sizes(folder).num_bytes / 1e6:,.1f}", []
        except CheckpointError as error:
            size, notes = "?", [f"damaged: {error}"]
        loss = read_score(folder).loss
        if folder.name == str(best):
            notes.append("best")
        if folder.name in map(str, aside):
            notes.append("best of another evaluation")
        if section is not None and folder.name.isdecimal() and is_milestone(section, int(folder.name)):
            notes.append("milestone")
        age, shown = _describe_age(now - folder.stat().st_mtime), "-" if loss is None else f"{loss:.4f}"
        lines.append(f"{folder.name:>10} {size:>10} {age:>8} {shown:>10}  {', '.join(notes)}".rstrip())
    return lines


def _describe_age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _read_section(folder: Path) -> TrainerSection | None:
    try:
        return read_checkpoint_config(folder).trainer
    except (StartupError, ConfigError, OSError):
        return None


def diff_checkpoints(one: Path, other: Path) -> list[str]:
    """What differs between two checkpoints, or the newest ones of two runs, as a resume would judge it.

    Raises:
        CheckpointError: one of them is not there or damaged.
        StartupError: their state cannot be read.
    """
    paths = []
    for path in (one, other):
        choice = choose_checkpoint(path)
        if choice.path is None:
            raise CheckpointError(f"{path} holds no checkpoint")
        paths.append(choice.path)
    (facts_one, saved_one), (facts_other, saved_other) = (read_facts(path) for path in paths)
    comparison = compare(facts_one, facts_other, (), same_ranks=saved_one["world_size"] == saved_other["world_size"])
    lines = [f"{paths[0]} -> {paths[1]}"]
    for name in ("step", "tokens", "eval_loss", "world_size", "versions", "lineage"):
        if saved_one.get(name) != saved_other.get(name):
            lines.append(f"  {name}: {json.dumps(saved_one.get(name))} -> {json.dumps(saved_other.get(name))}")
    return [*lines, *(comparison.table().splitlines() or ["  the same settings, data and tokenizer"])]


def read_facts(checkpoint: Path) -> tuple[Facts, dict[str, Any]]:
    """What identifies the run of a checkpoint, and its `train_state.json`.

    Raises:
        StartupError: a file is missing or torn.
    """
    saved, config = read_train_state(checkpoint), read_checkpoint_config(checkpoint)
    return describe_saved_run(checkpoint, saved, config), saved


def prune_run(run: Path, *, keep: int | None, dry_run: bool) -> list[str]:
    """Applies the retention of the run's newest valid checkpoint (with `keep` newest ones instead, if set).

    Raises:
        CheckpointError: there is no valid checkpoint, or `keep` is negative.
        StartupError: the run is running.
    """
    if keep is not None and keep < 0:
        raise CheckpointError(f"--keep: {keep}; write how many checkpoints stay, 0 for all")
    steps = valid_steps(run)
    if not steps:
        raise CheckpointError(f"{run} has no valid checkpoint: nothing is deleted")
    section = read_checkpoint_config(run / "checkpoints" / str(steps[-1])).trainer
    if keep is not None:
        section = replace(section, save_total_limit=keep)
    acquire_lock(run)
    try:
        removed, problems = prune(run, section, dry_run=dry_run)
    finally:
        release_lock(run)
    kept = [step for step in steps if step not in removed]
    verb = "would delete" if dry_run else "deleted"
    return [f"{verb}: {_join(removed)}", f"kept: {_join(kept)}", *problems]


def _join(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "nothing"
