"""Where the rows of a task are, and what is known of them before anything trains."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neobert.config.schema import Config
from neobert.config.schema_data import DatasetSection
from neobert.config.schema_glue import GlueSection
from neobert.data.source.tables import is_saved_table, open_tables
from neobert.disk import replacing
from neobert.errors import DataError
from neobert.finetune.labelled_data import LabelledExample, RowColumns, fingerprint, read_examples, read_splits
from neobert.glue.glue_tasks import HUB_NAME, TASKS, GlueTask

UNKNOWN = -1
"""The label of a row that has none, on the hub."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SplitRows:
    """A split that is evaluated."""

    texts: tuple[tuple[str, ...], ...]
    labels: NDArray[Any]
    """Numbers of classes, or numbers."""

    @property
    def is_labelled(self) -> bool:
        return bool((self.labels != UNKNOWN).all())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TaskData:
    """The rows of a task."""

    name: str
    config: Config
    """The user's, for this task: `task: finetune` with its columns and labels."""

    num_train: int
    """0 for a task that the models of another one answer."""

    splits: dict[str, SplitRows]
    """By `GlueTask.splits`."""

    fingerprint: str
    """A sha256 of all rows."""

    @property
    def task(self) -> GlueTask:
        return TASKS[self.name]


def fetch_tasks(config: Config, output_dir: Path) -> Config:
    """The config with a folder of its tasks: without `glue.data_dir` they are written into `data/` once, from the hub.

    So all cells read the same rows, and a suite that resumes needs no hub.

    Raises:
        DataError: the hub does not give a task, or not all of its splits.
    """
    if config.glue.data_dir is not None:
        return config
    folder = output_dir / "data"
    for name in config.glue.tasks:
        splits = _splits_of(TASKS[name])
        missing = {split: file for split in splits if not (file := folder / name / f"{split}.jsonl").is_file()}
        if missing:
            _fetch(config, name, missing)
    return replace(config, glue=replace(config.glue, data_dir=str(folder)))


def _splits_of(task: GlueTask) -> tuple[str, ...]:
    return task.splits if task.trained_on else ("train", *task.splits)


def _fetch(config: Config, name: str, files: dict[str, Path]) -> None:
    tables = open_tables(replace(config.dataset, name=HUB_NAME, path=None, config=name))
    for split, file in files.items():
        if split not in tables.splits:
            raise DataError(f"glue.data_dir: {tables.label} has no split {split!r}; it has {', '.join(tables.splits)}")
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary, temporary.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in tables.splits[split]())


def load_task_data(config: Config, name: str) -> TaskData:
    """Reads the rows of a task from `glue.data_dir`.

    Raises:
        DataError: a split is missing or cannot be read, or a label is none of the task's.
    """
    task = TASKS[name]
    prepared = _configure(config, name)
    first, *others = task.splits
    examples: dict[str, list[LabelledExample]] = {}
    if task.trained_on is None:
        found = read_splits(prepared)
        examples = {"train": found.train, first: found.evaluation}
    else:
        others = [first, *others]
    for split in others:
        examples[split] = _read_split(prepared, name, split)
    splits = {split: _as_rows(examples[split], name, split) for split in task.splits}
    if task.trained_on is None:
        _as_rows(examples["train"], name, "train")
    return TaskData(
        name=name,
        config=prepared,
        num_train=len(examples.get("train", ())),
        splits=splits,
        fingerprint=fingerprint(example for split in examples.values() for example in split),
    )


def _configure(config: Config, name: str) -> Config:
    """What fine-tunes on the task, at no point of a grid yet."""
    task = TASKS[name]
    text, *pair = task.columns
    finetune = replace(
        config.finetune,
        kind="classification" if task.labels else "regression",
        labels=task.labels,
        text_column=text,
        pair_column=pair[0] if pair else None,
        label_column="label",
        metric=task.select,
    )
    needed = (task.splits[0],) if task.trained_on else ("train", task.splits[0])
    dataset = _choose_source(config, name, needed)
    return replace(config, task="finetune", finetune=finetune, dataset=dataset, glue=GlueSection())


def _choose_source(config: Config, name: str, splits: tuple[str, ...]) -> DatasetSection:
    """Section `dataset` that reads a training and an evaluation split, or one split."""
    data = replace(config.dataset, name=None, path=None, revision=None)
    folder = Path(str(config.glue.data_dir)) / name
    if is_saved_table(folder):
        return replace(data, path=(str(folder),), train_split=splits[0], eval_split=splits[-1])
    # Files by name: `validation_matched` and `validation_mismatched` are one split to whoever reads the folder.
    return replace(data, path=tuple(str(path) for split in splits for path in _list_files(folder, split)))


def _list_files(folder: Path, split: str) -> list[Path]:
    """The files of a split: `train.jsonl.gz`, or `train-00000-of-00002.parquet` and its like."""
    found = sorted({*folder.glob(f"{split}.*"), *folder.glob(f"{split}-*")})
    if not found:
        there = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
        raise DataError(
            f"glue.data_dir: {folder} has no file {split}.* ({there} is there); put {split}.jsonl.gz there, leave the "
            f"task {folder.name} out of glue.tasks, or write null to fetch all of them from the hub"
        )
    return found


def _read_split(prepared: Config, name: str, split: str) -> list[LabelledExample]:
    """The examples of a split that is only answered."""
    data, columns = (
        prepared.dataset,
        RowColumns(text=TASKS[name].columns[0], pair=TASKS[name].columns[1], label="label"),
    )
    source = Path(str((data.path or ("",))[0]))
    if not is_saved_table(source):
        files = _list_files(source.parent, split)
        tables = open_tables(replace(data, path=tuple(map(str, files)), train_split=None, eval_split=None))
        rows: Iterator[Any] = (row for read in tables.splits.values() for row in read())
    else:
        tables = open_tables(data)
        if split not in tables.splits:
            raise DataError(f"glue.data_dir: {tables.label} has no split {split!r}; it has {', '.join(tables.splits)}")
        rows = tables.splits[split]()
    located = [(f"{split}, row {number}", row) for number, row in enumerate(rows, 1)]
    return read_examples(located, columns, is_words=False)


def _as_rows(examples: list[LabelledExample], name: str, split: str) -> SplitRows:
    """Texts and labels; the labels of a split that is only answered may be unknown."""
    task = TASKS[name]
    try:
        labels: NDArray[Any] = np.array([(int if task.labels else float)(x.label) for x in examples])
    except (TypeError, ValueError) as error:
        raise DataError(
            f"glue.data_dir: {name}, split {split}: a label is no number ({error}); write numbers as the hub has them"
        ) from error
    lowest = UNKNOWN if task.trained_on else 0
    if task.labels and not ((labels >= lowest) & (labels < len(task.labels))).all():
        wrong = labels[(labels < lowest) | (labels >= len(task.labels))][0]
        raise DataError(
            f"glue.data_dir: {name}, split {split} has the label {wrong}, not one of 0 to {len(task.labels) - 1} "
            f"({', '.join(task.labels)}); splits without labels cannot be used"
        )
    return SplitRows(texts=tuple(x.texts for x in examples), labels=labels)
