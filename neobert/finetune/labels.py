"""What labels are, which there are, their numbers and their weights. Pure.

A label is named by its text; an integer by its digits, and true and false so.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from neobert.errors import DataError
from neobert.objectives.classification import Kind

Located = Sequence[tuple[str, Any]]
"""(location of the row, its label as it is written)."""

MOST_INTEGERS = 50
"""More different integers than this are rather numbers than names of classes."""

_BIO = re.compile(r"O|[BI]-.+")


def choose_kind(requested: str, labels: Located, *, is_words: bool) -> Kind:
    """The kind of labels: the requested one, or that of how they are written.

    Raises:
        DataError: they are not of the requested kind, or may be of two.
    """
    found = _recognise(labels, is_words=is_words) if requested == "auto" else cast(Kind, requested)
    if is_words != (found == "tokens"):
        there = "lists of words" if is_words else "texts"
        remedy = "finetune.kind: tokens" if is_words else "a column of lists of words in finetune.text_column"
        raise DataError(f"finetune.kind: {found}, but the text column holds {there}; write {remedy}")
    expected = {"classification": _is_name, "regression": _is_number, "multilabel": _is_names, "tokens": _is_names}[
        found
    ]
    wrong = next(((where, label) for where, label in labels if not expected(label)), None)
    if wrong is not None:
        raise DataError(
            f"{wrong[0]}: label {wrong[1]!r} is not {_WRITTEN[found]}, as finetune.kind: {found} needs; correct it, "
            "or write another finetune.kind or finetune.label_column"
        )
    return found


_WRITTEN = {
    "classification": "a text or an integer",
    "regression": "a number",
    "multilabel": "a list of texts or integers",
    "tokens": "a list of texts or integers",
}


def _recognise(labels: Located, *, is_words: bool) -> Kind:
    if is_words:
        return "tokens"
    values = [label for _, label in labels]
    if any(_is_list(value) for value in values):
        return "multilabel"
    if all(_is_number(value) for value in values):
        if any(isinstance(value, float) or not _is_integer(value) for value in values):
            return "regression"
        different = {int(value) for value in values}
        if len(different) > MOST_INTEGERS:
            raise DataError(
                f"finetune.kind: auto, but the label column holds {len(different)} different integers from "
                f"{min(different)} to {max(different)}, which may be classes or numbers; write classification or "
                "regression"
            )
    return "classification"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value.strip()) is not None)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _is_name(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and value.is_integer())


def _is_names(value: Any) -> bool:
    return _is_list(value) and all(_is_name(item) for item in value)


def name_label(value: Any) -> str:
    """The name of one label."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, int | float) else str(value).strip()


def _names(kind: Kind, label: Any) -> list[Any]:
    """The labels of a row: the one, or those of its list."""
    return list(label) if kind in ("multilabel", "tokens") else [label]


def choose_labels(kind: Kind, requested: Sequence[str], labels: Located) -> tuple[str, ...]:
    """Names by number: those requested, or those of the training data, sorted, integers by their value; none for
    numbers.

    Raises:
        DataError: a label is not among the requested ones, there is a single one, or a tag breaks the BIO scheme.
    """
    if kind == "regression":
        return ()
    values = [value for _, label in labels for value in _names(kind, label)]
    if kind == "tokens" and not requested and any(isinstance(value, int) for value in values):
        raise DataError(
            "finetune.labels: the tags are integers, and nothing says which are entities; name them in the order of "
            "their numbers, for example [O, B-person, I-person]"
        )
    names = {name_label(value) for value in values}
    found = tuple(requested) or tuple(sorted(names, key=_by_value))
    check_known(kind, found, labels, training=True)
    if len(found) < 2 and kind != "multilabel":
        raise DataError(
            f"finetune.label_column: all {len(labels):,} rows have the label {', '.join(found)!r}, so there is nothing "
            "to learn; name another column, or read more rows"
        )
    if kind == "tokens":
        _check_tags(found)
    return found


def _by_value(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if re.fullmatch(r"-?\d+", name) else (1, 0, name)


def _check_tags(labels: Sequence[str]) -> None:
    """Tags of entities are all BIO; those of other tasks, none of which looks so, are any names."""
    if not is_bio(labels):
        return
    odd = [label for label in labels if not _BIO.fullmatch(label)]
    if odd:
        raise DataError(
            f"finetune.label_column: {odd[0]!r} is no tag of the BIO scheme, which the others follow; write O, B-TYPE "
            "for the first word of an entity and I-TYPE for the next ones"
        )


def is_bio(labels: Sequence[str]) -> bool:
    """Whether labels are tags of entities."""
    return any(label[:2] in ("B-", "I-") for label in labels)


def check_known(kind: Kind, labels: Sequence[str], rows: Located, *, training: bool = False) -> None:
    """Raises where a row has a label that is none of `labels`.

    Raises:
        DataError: with the first of them.
    """
    if kind == "regression":
        return
    numbers = _number_names(labels)
    for where, label in rows:
        for value in _names(kind, label):
            if _find(numbers, labels, value) is None:
                whose = "none of finetune.labels" if training else "none of the labels of the training data"
                remedy = (
                    "name it there, or correct the row"
                    if training
                    else (
                        "add rows with it to the training data, name all labels in finetune.labels, or correct the row"
                    )
                )
                raise DataError(f"{where}: label {name_label(value)!r} is {whose} ({_some(labels)}); {remedy}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f", ... ({len(names)})" if len(names) > 20 else "")


def _number_names(labels: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(labels)}


def _find(numbers: dict[str, int], labels: Sequence[str], value: Any) -> int | None:
    """The number of a label: by its name, or of an integer that is no name, as the number itself."""
    found = numbers.get(name_label(value))
    if found is None and _is_integer(value) and not any(map(_is_integer, labels)):
        return int(value) if 0 <= int(value) < len(labels) else None
    return found


_METRICS: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "macro_f1", "micro_f1", "mcc"),
    "multilabel": ("micro_f1", "macro_f1", "accuracy"),
    "regression": ("spearman", "pearson"),
    "tokens": ("entity_f1", "accuracy", "macro_f1", "micro_f1"),
}
"""What of `scores.METRICS` a kind of labels has."""


def check_metric(metric: str | None, kind: Kind) -> None:
    """Raises DataError where `finetune.metric` is none of the metrics of such labels."""
    if metric not in (None, "loss", *_METRICS[kind]):
        raise DataError(
            f"finetune.metric: {metric!r} is no metric of finetune.kind: {kind}; write loss or one of "
            f"{', '.join(_METRICS[kind])}"
        )


def number_labels(kind: Kind, labels: Sequence[str], rows: Iterable[Any]) -> list[Any]:
    """Labels as targets: an int, a float, fp32 `[C]`, or int64 `[words]`."""
    if kind == "regression":
        return [float(label) for label in rows]
    numbers = _number_names(labels)

    def find(label: Any) -> list[int]:
        return [cast(int, _find(numbers, labels, value)) for value in _names(kind, label)]

    if kind == "classification":
        return [find(label)[0] for label in rows]
    if kind == "tokens":
        return [np.array(find(label), dtype=np.int64) for label in rows]
    return [_one_hot(find(label), len(labels)) for label in rows]


def _one_hot(numbers: Sequence[int], size: int) -> NDArray[np.float32]:
    values = np.zeros(size, dtype=np.float32)
    values[list(numbers)] = 1
    return values


def choose_initial_score(requested: float | None, kind: Kind, labels: Sequence[Any]) -> float | None:
    """What a regression answers before it learned: the requested number, or the mean of the labels; None for other
    kinds.

    Raises:
        DataError: it is requested for labels that are no numbers.
    """
    if kind != "regression":
        if requested is not None:
            raise DataError(
                f"finetune.initial_score: has no effect with finetune.kind: {kind}, as the labels are; remove it"
            )
        return None
    return requested if requested is not None else math.fsum(map(float, labels)) / len(labels)


def choose_weights(
    requested: str | tuple[str, ...] | None, kind: Kind, labels: Sequence[str], rows: Sequence[Any]
) -> tuple[str, ...] | None:
    """`balanced` as numbers: targets / (labels x targets of the label), 1 where a label has none.

    Raises:
        DataError: there are not as many weights as labels, or such labels have none.
    """
    if requested is None:
        return None
    if kind in ("regression", "multilabel"):
        raise DataError(
            f"finetune.class_weights: has no effect with finetune.kind: {kind}, as the labels are; remove it"
        )
    if not isinstance(requested, str):
        if len(requested) != len(labels):
            raise DataError(
                f"finetune.class_weights: {list(requested)} are {len(requested)} weights, but there are {len(labels)} "
                f"labels ({_some(labels)}); write one for each, in this order"
            )
        return requested
    numbered = number_labels(kind, labels, rows)
    counts = Counter(int(x) for item in numbered for x in (item if kind == "tokens" else [item]))
    total = sum(counts.values())
    return tuple(repr(total / (len(labels) * counts[n]) if counts[n] else 1.0) for n in range(len(labels)))
