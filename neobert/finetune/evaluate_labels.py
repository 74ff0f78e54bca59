"""Evaluation on labelled examples: all of them, the same way every time, however many processes help."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neobert.data.rows.side_by_side import SideBySide
from neobert.disk import replacing
from neobert.finetune.example_data import FinetuneData
from neobert.finetune.example_order import ExampleCollator, TokenExamples
from neobert.finetune.labels import is_bio
from neobert.finetune.scores import METRICS
from neobert.objectives.classification import Kind, label_loss
from neobert.objectives.label_answers import default_label
from neobert.train.hardware.memory import memory_explained
from neobert.train.processes.agreement import broadcast, send_to_main, sharing_errors
from neobert.train.run import Run

Predictions = NDArray[np.int64] | NDArray[np.float64]

_Outputs = dict[int, NDArray[np.float32]]
"""Logits `[m, C]` of batches, by their number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelMetrics:
    """Metrics of one evaluation."""

    loss: float
    """Mean over the targets."""

    metrics: dict[str, float]
    metric: str
    """Which of them is compared, or `loss`."""

    num_rows: int

    @property
    def criterion(self) -> float:
        return self.loss if self.metric == "loss" else -self.metrics[self.metric]

    def as_line(self) -> dict[str, Any]:
        return {"loss": self.loss, "metrics": self.metrics, "num_rows": self.num_rows}

    def as_values(self) -> dict[str, float]:
        return {"eval/loss": self.loss, **{f"eval/{name}": value for name, value in self.metrics.items()}}

    def describe(self) -> str:
        parts = [f"loss {self.loss:.4f}", *(f"{name} {value:.4f}" for name, value in self.metrics.items())]
        return f"{' | '.join(parts)} | {self.num_rows:,} rows"


@torch.no_grad()
def evaluate_labels(run: Run) -> LabelMetrics | None:
    """Metrics of the evaluation examples, whose predictions go to `predictions/<step>.npz`; None without any, or when
    the run is asked to stop. Collective."""
    data = run.data
    assert isinstance(data, FinetuneData), "the data of fine-tuning on labels"
    if not len(data.evaluation):
        return None
    num_batches = -(-len(data.evaluation) // run.config.trainer.per_device_eval_batch_size)
    turns = -(-num_batches // run.runtime.world)
    with run.tracker.paused(), run.reporter.bar("evaluating", turns) as advance:
        found = _predict(run, data, advance)
    if found is None:
        return None
    with sharing_errors(run.runtime):
        parts = send_to_main(run.runtime, found)
        return broadcast(run.runtime, None if parts is None else _measure(run, data.evaluation, parts))


def _measure(run: Run, examples: TokenExamples, parts: Sequence[_Outputs]) -> LabelMetrics:
    """Metrics of what all processes have found; writes the predictions."""
    joined = {number: outputs for part in parts for number, outputs in part.items()}
    logits = torch.from_numpy(np.concatenate([joined[number] for number in sorted(joined)]))
    targets, section = _join_targets(examples), run.config.finetune
    loss = float(label_loss(examples.kind, logits, targets)) / max(1, len(targets))
    predictions = choose_predictions(examples, logits, section.labels)
    metrics = compute_metrics(examples, predictions, section.labels, section.metric)
    _write(run.output_dir, run.tracker.step, predictions)
    metric = section.metric or next(iter(metrics))
    return LabelMetrics(loss=loss, metrics=metrics, metric=metric, num_rows=len(examples))


def _predict(run: Run, data: FinetuneData, advance: Callable[[], None]) -> _Outputs | None:
    """What this process has computed of all examples; None when the run is asked to stop. Collective."""
    examples, runtime, size = data.evaluation, run.runtime, run.config.trainer.per_device_eval_batch_size
    texts = SideBySide(max_seq_length=run.config.dataset.max_seq_length, pad_id=run.tokenizer.pad_id)
    collate = ExampleCollator(examples=examples, texts=texts)
    starts = range(0, len(examples), size)
    found: _Outputs = {}
    run.model.eval()
    for turn in range(0, len(starts), runtime.world):
        if run.stop.agree(*runtime.sum_on_host(run.stop.requests())):
            run.model.train()
            return None
        # A rank without a batch left repeats the last one, so that all call the model equally often.
        number = min(turn + runtime.rank, len(starts) - 1)
        chosen = range(starts[number], min(starts[number] + size, len(examples)))
        batch = collate(examples.build_rows(list(chosen), run.tokenizer))
        with memory_explained(run, batch, "eval"):
            outputs = run.model(batch.to(runtime.device)).outputs
        found[number] = outputs.cpu().numpy()
        advance()
    run.model.train()
    return found


def _join_targets(examples: TokenExamples) -> Tensor:
    """Targets `[M, ...]` of the logits of all examples."""
    if examples.kind != "tokens":
        dtype = np.int64 if examples.kind == "classification" else np.float32
        return torch.from_numpy(np.array(examples.targets, dtype=dtype))
    kept = [np.asarray(target)[first >= 0] for target, first in zip(examples.targets, examples.firsts)]
    return torch.from_numpy(np.concatenate(kept))


def choose_predictions(examples: TokenExamples, logits: Tensor, labels: Sequence[str]) -> Predictions:
    """What is said of every target: a number of a label, `[M]`; 0 or 1 of each label, `[M, C]`; a number, `[M]`. A word
    that was cut off is said to be `O`."""
    if examples.kind == "regression":
        return logits[:, 0].double().numpy()
    if examples.kind == "multilabel":
        return (logits > 0).long().numpy()
    said = logits.argmax(1).numpy()
    if examples.kind == "classification":
        return said
    firsts = np.concatenate(list(examples.firsts))
    words = np.full(len(firsts), default_label(labels), dtype=np.int64)
    words[firsts >= 0] = said
    return words


def compute_metrics(
    examples: TokenExamples, predictions: Predictions, labels: Sequence[str], metric: str | None
) -> dict[str, float]:
    """The metrics of a kind, the one that counts first, and `metric`.

    Raises:
        DataError: `metric` is f1, and there are more than two labels.
    """
    names = list_metrics(examples.kind, labels)
    names += [metric] if metric is not None and metric not in ("loss", *names) else []
    if examples.kind != "tokens":
        targets = np.array(examples.targets)
        return {name: METRICS[name](predictions, targets) for name in names}
    flat, bounds = np.concatenate(list(examples.targets)), np.cumsum([len(x) for x in examples.firsts])[:-1]
    said, true = ([[labels[n] for n in part] for part in np.split(x, bounds)] for x in (predictions, flat))
    return {
        name: METRICS[name](said, true) if name == "entity_f1" else METRICS[name](predictions, flat) for name in names
    }


def list_metrics(kind: Kind, labels: Sequence[str]) -> list[str]:
    """Names of the metrics of a kind of labels, the one that counts first."""
    if kind == "classification":
        return ["accuracy", "macro_f1"]
    if kind == "tokens":
        return ["entity_f1", "accuracy"] if is_bio(labels) else ["accuracy", "macro_f1"]
    return ["micro_f1", "macro_f1"] if kind == "multilabel" else ["spearman", "pearson"]


def _write(output_dir: Path, step: int, predictions: Predictions) -> None:
    folder = output_dir / "predictions"
    folder.mkdir(exist_ok=True)
    with replacing(folder / f"{step}.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, predictions=predictions)


def load_predictions(output_dir: Path, step: int) -> Predictions:
    """What an evaluation at a step said."""
    with np.load(output_dir / "predictions" / f"{step}.npz") as saved:
        predictions: Predictions = saved["predictions"]
    return predictions
