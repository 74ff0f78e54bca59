"""Metrics of predictions against labels, by the names that `finetune.metric` and the table of tasks use.

The definitions are those of scikit-learn, scipy and seqeval, with which the tests compare them. They are written out
since they decide which checkpoint a run keeps, which should need no package that a run does not. All are better when
greater.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neobert.correlation import pearson, spearman
from neobert.errors import DataError

Tags = Sequence[Sequence[str]]
"""Tags of sequences of words: `O`, or `B-`, `I-`, `E-` or `S-` and a type."""


def accuracy(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Fraction of examples that are right; with several labels an example (`[N, L]`), right in all of them."""
    equal = predictions == labels
    return float((equal if equal.ndim == 1 else equal.all(axis=1)).mean())


def f1(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """F1 of class 1 among classes 0 and 1.

    Raises:
        DataError: there are other classes.
    """
    if not np.isin(predictions, (0, 1)).all() or not np.isin(labels, (0, 1)).all() or np.ndim(labels) != 1:
        raise DataError("finetune.metric: f1 is that of class 1 of two; use macro_f1 or micro_f1 for other labels")
    hits, predicted, true = _count(predictions[:, None] == 1, labels[:, None] == 1)
    return float(_f1(hits, predicted, true)[0])


def macro_f1(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Mean of the F1 of all classes that occur, or of all columns of `[N, L]`; 0 for one without a hit."""
    return float(_f1(*_count(*_as_columns(predictions, labels))).mean())


def micro_f1(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """F1 of all (example, label) pairs together; accuracy where an example has one class."""
    hits, predicted, true = _count(*_as_columns(predictions, labels))
    return float(_f1(hits.sum(keepdims=True), predicted.sum(keepdims=True), true.sum(keepdims=True))[0])


def mcc(predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    """Matthews' correlation of any number of classes (Gorodkin, 2004); 0 where one side has one class only."""
    columns = _as_columns(predictions, labels)
    hits, predicted, true = (x.astype(np.float64) for x in _count(*columns))
    total = len(labels)
    covariance = hits.sum() * total - predicted @ true
    norm = float(np.sqrt((total**2 - predicted @ predicted) * (total**2 - true @ true)))
    return float(covariance) / norm if norm else 0.0


def entity_f1(predictions: Tags, labels: Tags) -> float:
    """Micro-averaged F1 of whole entities, equal in type, first and last word; as seqeval has it by default."""
    hits = predicted = true = 0
    for ours, theirs in zip(predictions, labels, strict=True):
        found, expected = entities(ours), entities(theirs)
        hits, predicted, true = hits + len(found & expected), predicted + len(found), true + len(expected)
    return float(_f1(*(np.array([x]) for x in (hits, predicted, true)))[0])


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, word after the last) of every entity.

    An entity starts at `B-` or `S-`, after `O`, `E-` or `S-`, and where the type changes: an `I-` that follows no
    entity of its type starts one, as conlleval has it.
    """
    found, first = set(), 0
    before, kind = "O", ""
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        starts = prefix in "BS" or before in "ESO" or name != kind
        if before != "O" and (prefix == "O" or starts):
            found.add((kind, first, index))
        if prefix != "O" and starts:
            first = index
        before, kind = prefix, name
    return found


def _as_columns(predictions: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether each example has each label, `[N, L]`, predicted and true."""
    if np.ndim(labels) == 2:
        return predictions.astype(bool), labels.astype(bool)
    classes = np.union1d(predictions, labels)
    return predictions[:, None] == classes, labels[:, None] == classes


def _count(predicted: NDArray[np.bool_], true: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Hits, predicted and true examples of each column."""
    return (predicted & true).sum(axis=0), predicted.sum(axis=0), true.sum(axis=0)


def _f1(hits: NDArray[Any], predicted: NDArray[Any], true: NDArray[Any]) -> NDArray[np.float64]:
    return 2 * hits / np.maximum(predicted + true, 1)


METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "micro_f1": micro_f1,
    "mcc": mcc,
    "pearson": pearson,
    "spearman": spearman,
    "entity_f1": entity_f1,
}
"""Name -> function of (predictions, labels): classes `[N]`, 0 and 1 `[N, L]` for several labels an example, numbers
`[N]`, or the tags of sequences of words."""
