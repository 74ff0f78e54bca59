"""Folders of tasks made on the spot, and a stand-in for fine-tuning."""

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from small_corpus import OBJECTS, SUBJECTS, VERBS

from neobert.config.load import save_config
from neobert.config.schema import Config
from neobert.finetune.job import FinetuneResult
from neobert.glue.glue_tasks import TASKS

MakeConfig = Callable[..., Config]


def write_task(root: Path, name: str, *, sizes: tuple[int, int] = (12, 6), labelled: bool = True) -> None:
    """A folder with the splits of a task, with the hub's columns and as its files are called."""
    task, rng = TASKS[name], random.Random(name)
    (root / name).mkdir(parents=True)
    for split in (*(() if task.trained_on else ("train",)), *task.splits):
        lines = []
        for number in range(sizes[split != "train"]):
            label: Any = number % len(task.labels) if task.labels else float(number % 6)
            texts = {
                column: f"{rng.choice(SUBJECTS)} {VERBS[int(label)]} {rng.choice(OBJECTS)}." for column in task.columns
            }
            lines.append(json.dumps({**texts, "label": label if labelled else -1, "idx": number}) + "\n")
        with gzip.open(root / name / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(lines)


class FakeTraining:
    """Predictions that follow from the config of a cell alone."""

    def __init__(self) -> None:
        self.configs: list[Config] = []
        self.dies_at: int | None = None
        """Raises instead of the call of this number, from 0, as a process that is killed does."""

    def __call__(self, config: Config) -> FinetuneResult:
        if len(self.configs) == self.dies_at:
            raise KeyboardInterrupt
        self.configs.append(config)
        folder = Path(config.trainer.output_dir)
        folder.mkdir(parents=True)
        if config.trainer.mixed_precision == "auto":  # A run writes what it measured.
            save_config(replace(config, trainer=replace(config.trainer, mixed_precision="no")), folder / "config.yaml")
        (name,) = (x for x in TASKS if f"/cells/{x}/" in config.trainer.output_dir)
        task = TASKS[name]
        rng = np.random.default_rng([config.seed, round(config.optimizer.lr * 1e6)])
        size = 6
        predictions = rng.normal(size=size) if not task.labels else rng.integers(0, len(task.labels), size)
        return FinetuneResult(
            best_step=3,
            metrics={},
            predictions=predictions,
            steps=6,
            seconds=1.0,
            output_dir=folder,
            reason="finished",
        )
