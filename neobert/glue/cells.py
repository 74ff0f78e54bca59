"""A cell: one task at one point of the grid with one seed. What decides its score, and its result on disk."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from neobert.config.fields import FIELDS
from neobert.config.nesting import parse_json
from neobert.config.rules import BUDGETS
from neobert.config.schema import Config
from neobert.disk import write_json
from neobert.glue.grids import GRIDS, GridPoint
from neobert.glue.starts import ModelStart
from neobert.glue.task_data import TaskData

VERSION = 1
"""Of the protocol: raise it when the code scores otherwise than before with the same settings."""

_CELL_KEYS = ("seed", "optimizer.lr", "trainer.global_batch_size", "trainer.per_device_train_batch_size")
_ALSO = ("trainer.mixed_precision",)
"""Keys that a resume may change, and that decide a score all the same."""

_SOURCE = ("path", "name", "config", "revision", "train_split", "eval_split")
_ELSEWHERE = ("model.", "tokenizer.", "glue.", *(f"dataset.{x}" for x in _SOURCE))
"""Beginnings of keys that say which model and rows: those have digests of their own."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Cell:
    """Which one."""

    task: str
    point: GridPoint
    seed: int

    def describe(self) -> str:
        return f"{self.task} lr {self.point.lr:g}, {self.point.batch} rows, seed {self.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class CellResult:
    """What it gave."""

    score: float
    metrics: dict[str, dict[str, float]]
    """By split, then by metric; of tasks that its model answers too, by `task/split`."""

    best_step: int
    steps: int
    seconds: float


def build_cell_config(user: Config, data: TaskData, cell: Cell, start: ModelStart, output_dir: Path) -> Config:
    """The config that fine-tunes one cell. It evaluates once an epoch, and saves then."""
    trainer, grid = user.trainer, GRIDS[user.glue.grid]
    has_budget = any(FIELDS[key].value_in(user) is not None for key in BUDGETS)
    every = math.ceil(data.num_train / cell.point.batch)
    every = every if trainer.max_steps is None else min(every, trainer.max_steps)
    rows = trainer.per_device_train_batch_size
    config = replace(
        data.config,
        seed=cell.seed,
        optimizer=replace(user.optimizer, lr=cell.point.lr),
        trainer=replace(
            trainer,
            num_train_epochs=trainer.num_train_epochs if has_budget else grid.epochs,
            global_batch_size=cell.point.batch,
            per_device_train_batch_size=rows if isinstance(rows, str) else math.gcd(rows, cell.point.batch),
            eval_steps=every,
            save_steps=every,
            save_best=True,
            save_total_limit=1,
            resume_from_checkpoint="latest",
            output_dir=str(output_dir),
        ),
    )
    return start.apply(config)


def describe_protocol(user: Config, data: TaskData, points: list[GridPoint], seeds: list[int]) -> dict[str, Any]:
    """Everything that decides the scores of a task, but for the model."""
    shown = build_cell_config(
        user, data, Cell(task=data.name, point=points[0], seed=seeds[0]), ModelStart.none(), Path("-")
    )
    settings = {
        key: field.value_in(shown)
        for key, field in FIELDS.items()
        if (_decides(key, shown) and key not in _CELL_KEYS) or key == "model.dropout_prob"
    }
    task = data.task
    return {
        "version": VERSION,
        "task": data.name,
        "metrics": list(task.metrics),
        "select": task.select,
        "splits": list(task.splits),
        "data": data.fingerprint,
        "points": [asdict(point) for point in points],
        "evaluate": "once an epoch",
        "seeds": seeds,
        "micro_batch": user.trainer.per_device_train_batch_size,
        "settings": json.loads(json.dumps(settings)),
    }


def _decides(key: str, config: Config) -> bool:
    """Whether a key decides a score: all do but those that a resume may change freely."""
    if key.startswith(_ELSEWHERE):
        return False
    return FIELDS[key].known.choose_class(lambda name: FIELDS[name].value_in(config)) != "free" or key in _ALSO


def digest(value: Any) -> str:
    """The first 12 digits of the sha256 of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def cell_key(protocol: dict[str, Any], cell: Cell, start: ModelStart) -> str:
    """A digest of everything that decides the score of one cell."""
    shared = {name: value for name, value in protocol.items() if name not in ("points", "seeds")}
    return digest([shared, asdict(cell), start.identity])


def cell_folder(output_dir: Path, cell: Cell, key: str) -> Path:
    """The run of a cell; its result is the file of that name beside it."""
    point = cell.point
    return output_dir / "cells" / cell.task / f"lr{point.lr:g}_rows{point.batch}_seed{cell.seed}_{key}"


def save_cell(folder: Path, result: CellResult) -> None:
    """Writes the result of a finished cell, as a whole or not at all."""
    write_json(folder.with_name(f"{folder.name}.json"), asdict(result))


def load_cell(folder: Path) -> CellResult | None:
    """The result of a finished cell; None for one that is not."""
    file = folder.with_name(f"{folder.name}.json")
    return CellResult(**parse_json(file.read_text())) if file.is_file() else None
