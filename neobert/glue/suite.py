"""All cells of a model, one after the other: finished ones are skipped, one that was interrupted resumes."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neobert.config.load import load_saved_config
from neobert.config.schema import Config
from neobert.disk import locked, write_json
from neobert.errors import UserError
from neobert.finetune.job import FinetuneResult, finetune
from neobert.finetune.scores import METRICS
from neobert.glue.cells import (
    Cell,
    CellResult,
    build_cell_config,
    cell_folder,
    cell_key,
    describe_protocol,
    load_cell,
    save_cell,
)
from neobert.glue.glue_tasks import SOURCE_TASK, TASKS, check_tasks, order_tasks
from neobert.glue.grids import GridPoint, choose_points
from neobert.glue.score_table import RESULTS_FILE, build_results
from neobert.glue.starts import ModelStart, build_trained_start, choose_start_of
from neobert.glue.task_data import SplitRows, TaskData, fetch_tasks, load_task_data
from neobert.inference.model import load
from neobert.terminal import is_watched, progress_bar

Train = Callable[[Config], FinetuneResult]
Say = Callable[[str], None]


class CellStopped(UserError):
    """A cell did not train to its end."""

    def __init__(self, cell: Cell, reason: str) -> None:
        super().__init__(f"{cell.describe()} stopped before its end ({reason}); the same command resumes it")
        self.outcome = reason


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Suite:
    """What is run, with all that was checked before."""

    config: Config
    output_dir: Path
    start: ModelStart
    data: dict[str, TaskData]
    points: list[GridPoint]
    seeds: list[int]
    train: Train
    say: Say
    is_watched: bool
    """Whether there is a bar of the cells, and a line for each instead of its own lines."""

    results: dict[Cell, CellResult] = field(default_factory=dict)
    """Of the finished cells."""

    best_models: list[ModelStart] = field(default_factory=list)
    """The best model of SOURCE_TASK, where others start from it and it is known."""

    def protocol(self, name: str) -> dict[str, Any]:
        """Everything but the model that decides the scores of a task."""
        described = describe_protocol(self.config, self.data[TASKS[name].trained_on or name], self.points, self.seeds)
        if TASKS[name].trained_on is not None:
            task = TASKS[name]
            described |= {"task": name, "metrics": list(task.metrics), "splits": list(task.splits)}
            described["answers"] = {name: self.data[name].fingerprint}
        transfers = self.config.glue.transfer_from_task and TASKS[name].transfers
        return described | ({"starts_from": self.protocol(SOURCE_TASK)} if transfers else {})

    def folder(self, cell: Cell, start: ModelStart) -> Path:
        """The run of a cell, a new one where other tasks are to be answered by its model."""
        answers = {task: x.fingerprint for task, x in self.data.items() if x.task.trained_on == cell.task}
        decides = self.protocol(cell.task) | ({"answers": answers} if answers else {})
        return cell_folder(self.output_dir, cell, cell_key(decides, cell, start))


def run_suite(config: Config, *, say: Say, train: Train = finetune) -> dict[str, Any]:
    """Fine-tunes what is not finished yet, and writes `results.json` after every task.

    Returns:
        its content.

    Raises:
        DataError: tasks, model or data cannot be used; nothing was trained then.
        CellStopped: a cell was stopped: the same command resumes.
    """
    check_tasks(config.glue.tasks, transfer=config.glue.transfer_from_task)
    output_dir = Path(config.trainer.output_dir)
    with locked(output_dir):
        config = fetch_tasks(config, output_dir)
        suite = Suite(
            config=config,
            output_dir=output_dir,
            start=choose_start_of(config, output_dir),
            data={name: load_task_data(config, name) for name in config.glue.tasks},
            points=choose_points(config.glue),
            seeds=[config.seed + number for number in range(config.glue.seeds)],
            train=train,
            say=say,
            is_watched=config.trainer.console == "auto" and is_watched(),
        )
        names = order_tasks([name for name in config.glue.tasks if TASKS[name].trained_on is None])
        num_cells = len(names) * len(suite.points) * len(suite.seeds)
        with progress_bar("cells", num_cells, active=suite.is_watched) as show:
            for name in names:
                for cell in list_cells(suite, name):
                    suite.results[cell] = run_cell(suite, cell)
                    show(len(suite.results))
                write_json(output_dir / RESULTS_FILE, summarise(suite))
                if name == SOURCE_TASK and config.glue.transfer_from_task:
                    suite.best_models.append(_choose_best_model(suite))
    return summarise(suite)


def list_cells(suite: Suite, name: str) -> list[Cell]:
    """The cells of a task: all seeds of a point, then the next point."""
    return [Cell(task=name, point=point, seed=seed) for point in suite.points for seed in suite.seeds]


def summarise(suite: Suite) -> dict[str, Any]:
    """The content of `results.json`, for the tasks that are finished."""
    finished = [
        name for name in suite.data if (TASKS[name].trained_on or name) in {cell.task for cell in suite.results}
    ]
    protocols = {name: suite.protocol(name) for name in finished}
    return build_results(suite.config, suite.start, suite.results, protocols)


def run_cell(suite: Suite, cell: Cell) -> CellResult:
    """The result of a cell: the one on disk, or that of training it.

    Raises:
        CellStopped: it was stopped.
    """
    start = _start_of(suite, cell)
    folder = suite.folder(cell, start)
    known, others_start_there = load_cell(folder), cell.task == SOURCE_TASK and suite.config.glue.transfer_from_task
    if known and others_start_there and not (folder / "checkpoints" / str(known.best_step)).is_dir():
        shutil.rmtree(folder, ignore_errors=True)  # Finished without transfer: only the score was kept.
        known = None
    if known is not None:
        suite.say(f"{cell.describe()}: {100 * known.score:.1f} (finished before)")
        return known
    data = suite.data[cell.task]
    config = build_cell_config(suite.config, data, cell, start, folder)
    if suite.is_watched:
        config = replace(config, trainer=replace(config.trainer, console="quiet"))
    trained = suite.train(keep_precision(config, suite.output_dir))
    if trained.reason not in ("finished", "complete"):
        raise CellStopped(cell, trained.reason)
    result = _score(suite, data, trained, folder)
    save_cell(folder, result)
    if not others_start_there:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    suite.say(f"{cell.describe()}: {100 * result.score:.1f} in {result.seconds / 60:.1f} minutes")
    return result


def keep_precision(config: Config, output_dir: Path) -> Config:
    """The config with the precision that `auto` was in a cell before: a measurement that is close could end otherwise
    in the next one, or after a kill."""
    saved = sorted(output_dir.glob("cells/*/*/config.yaml"))
    if config.trainer.mixed_precision != "auto" or not saved:
        return config
    precision = load_saved_config(saved[0]).trainer.mixed_precision
    return replace(config, trainer=replace(config.trainer, mixed_precision=precision))


def _start_of(suite: Suite, cell: Cell) -> ModelStart:
    transfers = suite.config.glue.transfer_from_task and TASKS[cell.task].transfers
    return suite.best_models[0] if transfers else suite.start


def _choose_best_model(suite: Suite) -> ModelStart:
    """The checkpoint of the best cell of SOURCE_TASK, the first of equal ones."""
    cell = max(list_cells(suite, SOURCE_TASK), key=lambda cell: suite.results[cell].score)
    folder = suite.folder(cell, suite.start)
    return build_trained_start(folder / "checkpoints" / str(suite.results[cell].best_step))


def _score(suite: Suite, data: TaskData, trained: FinetuneResult, folder: Path) -> CellResult:
    first, *others = data.task.splits
    assert trained.predictions is not None, "every cell is evaluated"
    best_step = trained.best_step
    assert best_step is not None
    metrics = {first: compute(data.name, trained.predictions, data.splits[first].labels)}
    answered = {(data.name, split): data.splits[split] for split in others}
    answered |= {
        (name, split): rows
        for name, other in suite.data.items()
        if other.task.trained_on == data.name
        for split, rows in other.splits.items()
    }
    for (name, split), rows in answered.items():
        said = answer_rows(folder / "checkpoints" / str(best_step), rows, TASKS[name].labels)
        where = split if name == data.name else f"{name}/{split}"
        if rows.is_labelled:
            metrics[where] = compute(name, said, rows.labels)
        else:
            _write_answers(folder.with_name(f"{folder.name}_{name}.tsv"), said, TASKS[name].labels)
    own = [mean(metrics[split]) for split in data.task.splits]
    return CellResult(
        score=float(np.mean(own)),
        metrics=metrics,
        best_step=best_step,
        steps=trained.steps,
        seconds=trained.seconds,
    )


def compute(name: str, predictions: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """The metrics of a task."""
    return {metric: METRICS[metric](predictions, labels) for metric in TASKS[name].metrics}


def mean(metrics: dict[str, float]) -> float:
    """The score of a split."""
    return float(np.mean(list(metrics.values())))


def answer_rows(checkpoint: Path, rows: SplitRows, labels: Sequence[str]) -> NDArray[np.int64]:
    """Numbers of the labels that a fine-tuned model gives to pairs of texts."""
    model = load(checkpoint)
    texts = ["\t".join(text.replace("\t", " ") for text in pair) for pair in rows.texts]
    answers: Sequence[Any] = model.predict(texts, top_k=1)
    return np.array([labels.index(answer.label) for answer in answers], dtype=np.int64)


def _write_answers(file: Path, said: NDArray[np.int64], labels: Sequence[str]) -> None:
    """Answers to rows whose labels nobody has, in the form that GLUE's site takes."""
    lines = [f"{number}\t{labels[label]}" for number, label in enumerate(said.tolist())]
    file.write_text("\n".join(["index\tprediction", *lines]) + "\n", encoding="utf-8")
