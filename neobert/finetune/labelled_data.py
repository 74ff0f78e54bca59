"""Rows of a source -> labelled examples: which part trains, which columns, what a label is, and which labels there are.

    rows --splits--> training and evaluation --columns--> examples --kind--> labels by number

All that can be wrong with them is said here, before anything is built.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from neobert.config.schema import Config
from neobert.config.schema_data import DatasetSection
from neobert.config.schema_finetune import FinetuneSection
from neobert.data.rows.order import Permutation, key
from neobert.data.source.splits import (
    check_disjoint,
    check_split,
    choose_eval_split,
    choose_train_split,
    parse_split,
    slice_bounds,
)
from neobert.data.source.tables import RawRow, open_tables
from neobert.errors import DataError
from neobert.finetune.labels import (
    check_known,
    check_metric,
    choose_initial_score,
    choose_kind,
    choose_labels,
    choose_weights,
)

TEXTS = ("text", "sentence", "sentence1", "premise", "question", "question1", "query", "anchor", "content")
"""Columns of a text, the first that is there."""

WORDS = ("tokens", "words")
PAIRS = {
    "sentence1": ("sentence2",),
    "premise": ("hypothesis",),
    "question": ("sentence", "question2", "context"),
    "question1": ("question2",),
    "text": ("text2", "text_pair"),
    "query": ("document", "passage"),
    "anchor": ("positive",),
}
"""Column of a second text that belongs to one of the first."""

LABELS = ("label", "labels", "score", "ner_tags", "tags", "class", "target")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledExample:
    """One row of a source."""

    location: str
    """Split and number, for messages."""

    texts: tuple[str, ...]
    """A text, the two of a pair, or the words of a list."""

    label: Any
    """As it is written: a text, a number, or a list of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowColumns:
    """Where the parts of an example are in a row."""

    text: str
    pair: str | None
    label: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelledSplits:
    """What a run trains and evaluates on."""

    columns: RowColumns
    is_words: bool
    """Whether examples are lists of words."""

    train: list[LabelledExample]
    evaluation: list[LabelledExample]
    notes: tuple[str, ...]


def read_splits(config: Config) -> LabelledSplits:
    """The examples of a config.

    Raises:
        DataError: the source cannot be read, a column is not there, or a row has no text or no label.
    """
    data = config.dataset
    tables = open_tables(data)
    names = list(tables.splits)
    train_split = choose_train_split(names, data.train_split)
    eval_split = data.eval_split or choose_eval_split(names, train_split)
    if eval_split is not None:
        check_split(names, eval_split, "dataset.eval_split")
    rows = {
        name: list(tables.splits[name]())
        for name in dict.fromkeys(parse_split(x).name for x in (train_split, eval_split) if x is not None)
    }
    train_rows = _slice(rows, train_split)
    columns = choose_row_columns(config.finetune, _list_columns(row for _, row in train_rows), tables.label)
    is_words = _is_list(train_rows[0][1].get(columns.text))
    train = read_examples(train_rows, columns, is_words=is_words)
    pair = "" if columns.pair is None else f" with {columns.pair!r}"
    notes = [f"texts from column {columns.text!r}{pair}, labels from {columns.label!r}"]
    notes += [f"training on split {train_split!r} of {tables.label}; splits found: {', '.join(names)}"]
    if eval_split is None:
        train, evaluation, note = _hold_out(train, data)
    else:
        parsed = parse_split(train_split)
        check_disjoint(parsed, parse_split(eval_split), lambda: len(rows[parsed.name]))
        evaluation = read_examples(_slice(rows, eval_split), columns, is_words=is_words)[: data.eval_samples]
        note = f"evaluating on {len(evaluation):,} rows of split {eval_split!r}"
    return LabelledSplits(columns=columns, is_words=is_words, train=train, evaluation=evaluation, notes=(*notes, note))


def _slice(rows: dict[str, list[RawRow]], split: str) -> list[tuple[str, RawRow]]:
    parsed = parse_split(split)
    found = rows[parsed.name]
    if not found:
        raise DataError(f"split {parsed.name!r} has no rows; name another one with dataset.train_split or eval_split")
    first, last = slice_bounds(parsed, len(found))
    return [(f"{parsed.name}, row {number}", row) for number, row in enumerate(found, 1)][first:last]


def _list_columns(rows: Iterable[RawRow]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if name))


def _hold_out(
    examples: list[LabelledExample], data: DatasetSection
) -> tuple[list[LabelledExample], list[LabelledExample], str]:
    """The examples that train, those that are held out, and a sentence. Drawn alike for all seeds of a run."""
    if data.eval_samples is None and data.validation_split is None:
        return examples, [], "no evaluation: no validation split, and neither dataset.eval_samples nor validation_split"
    total = len(examples)
    count = data.eval_samples or max(1, round(total * (data.validation_split or 0)))
    if count >= total:
        name = "eval_samples" if data.eval_samples else "validation_split"
        value = data.eval_samples or data.validation_split
        raise DataError(f"dataset.{name}: {value} leaves none of the {total} rows to train on; lower it")
    drawn = set(Permutation(total, key(0, "eval_rows"))(np.arange(count)).tolist())
    train = [example for number, example in enumerate(examples) if number not in drawn]
    evaluation = [example for number, example in enumerate(examples) if number in drawn]
    return train, evaluation, f"evaluating on {count:,} rows that are held out of the {total:,}"


def choose_row_columns(section: FinetuneSection, names: Sequence[str], label: str) -> RowColumns:
    """The columns to read of rows with `names`.

    Raises:
        DataError: a named column is not there, or none has a usual name.
    """
    for key_name in ("text_column", "pair_column", "label_column"):
        name = getattr(section, key_name)
        if name is not None and name not in names:
            raise DataError(f"finetune.{key_name}: {name!r} is not in {label}; its columns are {', '.join(names)}")
    usual = {"tokens": WORDS, "auto": (*WORDS, *TEXTS)}.get(section.kind, TEXTS)
    text = section.text_column or _first(usual, names)
    if text is None:
        raise DataError(
            f"{label}: none of its columns ({', '.join(names)}) is called {', '.join(usual)}; name the one with the "
            "text in finetune.text_column"
        )
    found = section.label_column or _first(LABELS, [name for name in names if name != text])
    if found is None:
        raise DataError(
            f"{label}: none of its columns ({', '.join(names)}) is called {', '.join(LABELS)}; name the one with the "
            "label in finetune.label_column"
        )
    pair = section.pair_column or _first(PAIRS.get(text, ()), names)
    return RowColumns(text=text, pair=pair, label=found)


def _first(candidates: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in candidates if name in names), None)


def read_examples(rows: Sequence[tuple[str, RawRow]], columns: RowColumns, *, is_words: bool) -> list[LabelledExample]:
    """The examples of located rows.

    Raises:
        DataError: a row has no text or no label, or nothing but empty texts.
    """
    examples = []
    for location, row in rows:
        texts = (_read_words if is_words else _read_texts)(row, columns, location)
        label = row.get(columns.label)
        if label is None or label == "":
            raise DataError(
                f"{location}: column {columns.label!r} has no label; correct the row, or name another column in "
                "finetune.label_column"
            )
        examples.append(LabelledExample(location=location, texts=texts, label=label))
    if not any(text.strip() for example in examples for text in example.texts):
        raise DataError(
            f"finetune.text_column: every text of column {columns.text!r} is empty; name the column with the text"
        )
    return examples


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _read_texts(row: RawRow, columns: RowColumns, location: str) -> tuple[str, ...]:
    names = (columns.text,) if columns.pair is None else (columns.text, columns.pair)
    for name in names:
        if not isinstance(row.get(name), str):
            raise DataError(
                f"{location}: column {name!r} has no text ({row.get(name)!r}); correct the row, or name another column "
                "in finetune.text_column or pair_column"
            )
    return tuple(row[name] for name in names)


def _read_words(row: RawRow, columns: RowColumns, location: str) -> tuple[str, ...]:
    words: Any = row.get(columns.text)
    tags: Any = row.get(columns.label)
    if not _is_list(words) or not all(isinstance(word, str) for word in words):
        raise DataError(f"{location}: column {columns.text!r} is no list of words; write every word as a text")
    if _is_list(tags) and len(tags) != len(words):
        raise DataError(
            f"{location}: {len(words)} words in {columns.text!r}, but {len(tags)} labels in {columns.label!r}; every "
            "word needs one label"
        )
    return tuple(words)


def fingerprint(examples: Iterable[LabelledExample]) -> str:
    """A sha256 of texts and labels."""
    digest = hashlib.sha256()
    for example in examples:
        line = json.dumps([example.texts, example.label], ensure_ascii=False, default=str)
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return f"sha256:{digest.hexdigest()}"


def bind_labels(config: Config, splits: LabelledSplits) -> Config:
    """The config with what its data decides: kind, columns, labels and their weights.

    Raises:
        DataError: the labels cannot be learned as configured.
    """
    section = config.finetune
    kind = choose_kind(section.kind, [(x.location, x.label) for x in splits.train], is_words=splits.is_words)
    check_metric(section.metric, kind)
    labels = choose_labels(kind, section.labels, [(x.location, x.label) for x in splits.train])
    evaluated = [(x.location, x.label) for x in splits.evaluation]
    choose_kind(kind, evaluated, is_words=splits.is_words)
    check_known(kind, labels, evaluated)
    train_labels = [x.label for x in splits.train]
    bound = replace(
        section,
        kind=kind,
        labels=labels,
        text_column=splits.columns.text,
        pair_column=splits.columns.pair,
        label_column=splits.columns.label,
        class_weights=choose_weights(section.class_weights, kind, labels, train_labels),
        initial_score=choose_initial_score(section.initial_score, kind, train_labels),
    )
    return replace(config, finetune=bound)
