"""What an output folder holds, and setting an earlier run aside: of a run only, and without losing any of it."""

import glob
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from neobert.config.nesting import parse_json
from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.weights.folder import MANIFEST, MODEL_FILE, checkpoint_steps

TRACE, SNAPSHOT = "profiler_trace.json", "snapshot.pickle"
"""What the profiler writes."""

LOGS = {"log.jsonl": "kind", "events.jsonl": "event"}
"""Files that a run appends to, and the name that every line of theirs has."""

_MARKS = ("checkpoints", *LOGS)
"""Names of which a run leaves at least one."""

_TRACKERS = ("wandb_id.txt", "tensorboard", "trackio_id.txt", "mlflow_id.txt")

ENTRIES = (*_MARKS, "training.log", "config.yaml", "tokenizer", "tokenized", "report", *_TRACKERS, TRACE, SNAPSHOT)
"""What a run writes into its folder, in the order in which it is moved: a kill between two moves leaves what is still
known as a run."""


def holds_run(output_dir: Path) -> bool:
    """Whether there is something that is called as what a run leaves."""
    return bool(_found(output_dir))


def _found(output_dir: Path) -> list[str]:
    return [name for name in _MARKS if os.path.lexists(output_dir / name) and not _is_empty(output_dir / name)]


def _is_empty(path: Path) -> bool:
    if path.is_dir():
        return all(found.is_dir() for found in path.rglob("*"))
    return path.is_file() and not path.stat().st_size


def check_output_dir(config: Config) -> None:
    """Raises where a run would write into another run, into a folder of weights or into its own data.

    Raises:
        StartupError: naming what it would write into.
    """
    output_dir = config.trainer.output_dir
    real, refused = Path(os.path.realpath(output_dir)), f"trainer.output_dir: {output_dir}"
    for parent in real.parents:
        if real.relative_to(parent).parts[0] in ENTRIES and _is_run(parent):
            raise StartupError(f"{refused} is a part of the run in {parent}, which it would damage; choose another")
    if (real / MODEL_FILE).is_file() and not holds_run(real):
        raise StartupError(f"{refused} holds the weights {MODEL_FILE}: it is no folder of a run; choose another")
    from neobert.data.source.formats import find_covering  # Reads data with libraries that a pipeline can do without.

    written = ("log.jsonl", "checkpoints/1/model_config.json")
    from neobert.objectives.table import choose_objective  # Needs torch, which other functions here do without.

    data = config.dataset if choose_objective(config).reads != "pairs" else None
    source = data and next((x for name in written if (x := find_covering(data, str(real / name))) is not None), None)
    if source is not None:
        raise StartupError(
            f"{refused} is where dataset.path: {source} is searched for files, so that the next start would read "
            "what this one writes as data; choose a folder outside of it"
        )


def _inputs_inside(config: Config, output_dir: Path) -> Iterator[tuple[str, str, str]]:
    """(key, path, first name below the output folder) of everything that a config reads from its own output folder."""
    data, section = config.dataset, config.contrastive
    named: dict[str, tuple[str | tuple[str, ...] | None, ...]] = {
        "dataset.path": (data.path, *(source.path for source in data.mixture)),
        "tokenizer.path": (config.tokenizer.path,),
        "model.init_from": (config.model.init_from,),
        "trainer.resume_from_checkpoint": (config.trainer.resume_from_checkpoint,),
        "trainer.probe_sets": config.trainer.probe_sets,
        "contrastive.pretrained_checkpoint_dir": (section.pretrained_checkpoint_dir,),
        "finetune.model": (config.finetune.model,),
        "contrastive.pretraining_dataset": (section.pretraining_dataset,),
        "contrastive.sets": tuple(source.name for source in (*section.sets, *section.eval_sets)),
    }
    real = Path(os.path.realpath(output_dir))
    for key, paths in named.items():
        for path in (x for entry in paths for x in ((entry,) if isinstance(entry, str) else entry or ())):
            parts = Path(path).expanduser().parts
            real_path = Path(os.path.realpath(Path(*(part for part in parts if not glob.has_magic(part)))))
            if real_path.is_relative_to(real) and real_path.exists():
                yield key, path, (*real_path.relative_to(real).parts, ENTRIES[0])[0]


def check_own(output_dir: Path) -> None:
    """Raises where a run would mix with what is not one of ours.

    Raises:
        StartupError: naming what was found.
    """
    found = _found(output_dir)
    if found and not _is_run(output_dir):
        raise StartupError(
            f"trainer.output_dir: {output_dir} has {' and '.join(found)}, but no checkpoint and no log of a run of "
            "this code: what is there is neither continued nor set aside; move it, or choose another trainer.output_dir"
        )


def check_unused(config: Config, continuing: str) -> None:
    """Raises where a fresh start would mix with what is in the output folder.

    Args:
        continuing: how to continue the run there.

    Raises:
        StartupError: there is a run that is not to be overwritten, or something that is no run of ours.
    """
    output_dir = Path(config.trainer.output_dir)
    check_own(output_dir)
    if holds_run(output_dir) and not config.trainer.overwrite_output_dir:
        raise StartupError(
            f"trainer.output_dir: {output_dir} already holds a run; {continuing}, or set trainer.overwrite_output_dir: "
            "true to start again (the old run is kept beside it under another name), or choose another "
            "trainer.output_dir"
        )
    for key, path, name in _inputs_inside(config, output_dir) if holds_run(output_dir) else ():
        if name in ENTRIES:
            raise StartupError(
                f"{key}: {path} is a part of the run that trainer.overwrite_output_dir would set aside; choose another "
                "trainer.output_dir"
            )


def _is_run(output_dir: Path) -> bool:
    """Whether nothing but a run of ours can have left what is there: one of its logs, or a checkpoint of it."""
    checkpoints = (output_dir / "checkpoints" / str(step) for step in checkpoint_steps(output_dir))
    if any((folder / name).is_file() for folder in checkpoints for name in (MANIFEST, "train_state.json")):
        return True
    return any(_starts_as_log(output_dir / name, key) for name, key in LOGS.items())


def _starts_as_log(path: Path, key: str) -> bool:
    try:
        with path.open(encoding="utf-8") as lines:
            first = parse_json(lines.readline(1_000_000))
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and {key, "step"} <= first.keys()


def set_aside(output_dir: Path, config: Config | None = None) -> Path:
    """Moves the run in an output folder away, so that overwriting loses nothing; returns where it is.

    The folder is renamed, the one that a link points to beside itself, and made again. A folder that cannot be renamed
    (a mount point, one that this process works in, a parent that cannot be written), or in which `config` has inputs,
    keeps its name, and what the run wrote is moved to a folder in it.

    Raises:
        StartupError: it cannot be moved.
    """
    real = output_dir.resolve()
    has_inputs = config is not None and any(_inputs_inside(config, output_dir))
    if not has_inputs and real not in (Path.cwd(), *Path.cwd().parents):
        with suppress(OSError):
            aside = next(free_names(real.with_name(f"{real.name}.old")))
            real.rename(aside)
            real.mkdir()
            return aside
    aside = next(free_names(real / "old"))
    try:
        aside.mkdir()
        for name in ENTRIES:
            if os.path.lexists(real / name):
                (real / name).rename(aside / name)
    except OSError as error:
        raise StartupError(
            f"trainer.overwrite_output_dir: the run in {output_dir} cannot be moved to {aside} ({error.strerror}: "
            f"{error.filename}); nothing of it is lost, move it yourself or choose another trainer.output_dir"
        ) from error
    return aside


def free_names(stem: Path) -> Iterator[Path]:
    """`<stem>-1`, `<stem>-2` and so on, as far as there is nothing of the name."""
    number = 1
    while True:
        path = stem.with_name(f"{stem.name}-{number}")
        if not os.path.lexists(path):
            yield path
        number += 1
