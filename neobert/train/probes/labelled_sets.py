"""The pinned sets of `trainer.probe_sets`: at most so many examples of a file, the same ones in every run.

Which ones is decided by a hash of their text and of `trainer.probe_seed`, so neither the order of the file nor rows
that are added elsewhere change the others. A text that occurs twice counts once: its twin would be its nearest
neighbour.
"""

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neobert.config.schema_data import MAX_RECORD_BYTES
from neobert.data.rows.lanes import IntArray
from neobert.data.source.codecs import strip_codec
from neobert.data.source.files import local_file
from neobert.data.source.tables import Limits, RawRow, inspect_tables, read_file
from neobert.data.source.text import RecordCounts
from neobert.data.tokenizer import Tokenizer
from neobert.errors import DataError

FEWEST = 10
"""Examples that a set must have."""

_TEXTS, _PAIRS, _LABELS, _SCORES = ("text", "sentence"), ("sentence1", "sentence2"), ("label",), ("score", "label")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProbeSet:
    """Texts with classes, or pairs of texts with scores."""

    name: str
    documents: tuple[IntArray, ...]
    """`[CLS] text [SEP]` of every text; of pairs all first texts, then all second ones."""

    classes: NDArray[np.int64] | None
    scores: NDArray[np.float64] | None
    """One of the two is there."""

    num_rows: int
    """Usable rows of the file."""

    fingerprint: str
    """Of the chosen examples and what is known of them: results of the same one can be compared."""

    def describe(self) -> str:
        """One line for people."""
        if self.classes is not None:
            counts = np.bincount(self.classes)
            largest = f"the largest has {counts.max() / counts.sum():.1%}"
            what = f"{len(self.classes):,} texts of {len(counts)} classes ({largest})"
        else:
            what = f"{len(self.documents) // 2:,} scored pairs"
        return f"{self.name}: {what} of {self.num_rows:,} rows, {self.fingerprint}"


def name_sets(paths: Sequence[str]) -> list[str]:
    """The name of each file in the record: its last folder and its name without endings.

    >>> name_sets(["/data/sst2/validation.jsonl.gz", "own.csv"])
    ['sst2/validation', 'own']
    """
    names = ["/".join((*Path(path).parts[-2:-1], Path(strip_codec(path)).stem)).lstrip("/") for path in paths]
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(f"trainer.probe_sets: several files are called {min(twice)}; rename one, or its folder")
    return names


def load_probe_set(path: str, name: str, tokenizer: Tokenizer, *, most: int, seed: int, max_length: int) -> ProbeSet:
    """Reads a file; texts are cut at `max_length` tokens, [CLS] and [SEP] included.

    Raises:
        DataError: the file is not there, or lacks columns or examples.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"trainer.probe_sets: {path} is no file; name JSONL, CSV, TSV or Parquet files")
    counts = RecordCounts(max_bad=0, where=f"trainer.probe_sets: {path}")
    files = inspect_tables([local_file(file)], path)
    rows = (row for file in files for row in read_file(file, Limits(max_record_bytes=MAX_RECORD_BYTES, counts=counts)))
    examples, num_rows = _choose(rows, path, most=most, seed=seed)
    texts = [[str(text) for text in example[0]] for example in examples]
    values = [example[1] for example in examples]
    is_scored = len(texts[0]) == 2
    flat = [text for position in range(len(texts[0])) for text in (row[position] for row in texts)]
    specials = tokenizer.cls_id, tokenizer.sep_id
    documents = tuple(
        np.array([specials[0], *ids[: max_length - 2], specials[1]], dtype=np.int32)
        for ids in tokenizer.encode_batch(flat)
    )
    fingerprint = hashlib.sha256(repr([texts, [str(value) for value in values]]).encode()).hexdigest()[:16]
    classes = scores = None
    if is_scored:
        scores = np.array([_read_score(value, path) for value in values])
    else:
        labels, classes = np.unique([str(value) for value in values], return_inverse=True)
        if len(labels) < 2:
            raise DataError(f"trainer.probe_sets: all examples of {path} have the label {labels[0]}; name another file")
    return ProbeSet(
        name=name,
        documents=documents,
        classes=classes,
        scores=scores,
        num_rows=num_rows,
        fingerprint=f"sha256:{fingerprint}",
    )


Example = tuple[tuple[Any, ...], Any]
"""The texts of a row, and its label or score."""


def _choose(rows: Iterator[RawRow], path: str, *, most: int, seed: int) -> tuple[list[Example], int]:
    seen: set[int] = set()
    columns: tuple[tuple[str, ...], str] | None = None

    def hashed() -> Iterator[tuple[int, int, Example]]:
        nonlocal columns
        for row in rows:
            columns = columns or _choose_columns(row, path)
            texts, value = tuple(row.get(name) for name in columns[0]), row.get(columns[1])
            if value in (None, "") or not all(isinstance(text, str) and text.strip() for text in texts):
                continue
            number = int.from_bytes(hashlib.blake2b(f"{seed}\0{texts}".encode(), digest_size=8).digest())
            if number not in seen:
                seen.add(number)
                yield number, len(seen), (texts, value)

    chosen = [example for _, _, example in heapq.nsmallest(most, hashed())]
    if len(chosen) < FEWEST:
        raise DataError(
            f"trainer.probe_sets: {path} has {len(chosen)} examples with texts and a label or score; at least {FEWEST} "
            "are needed"
        )
    return chosen, len(seen)


def _choose_columns(row: RawRow, path: str) -> tuple[tuple[str, ...], str]:
    if all(name in row for name in _PAIRS) and (value := next((name for name in _SCORES if name in row), None)):
        return _PAIRS, value
    text = next((name for name in _TEXTS if name in row), None)
    if text is not None and (value := next((name for name in _LABELS if name in row), None)):
        return (text,), value
    raise DataError(
        f"trainer.probe_sets: {path} has the columns {', '.join(row)}; rename them to text and label, or to sentence1, "
        "sentence2 and score"
    )


def _read_score(value: Any, path: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise DataError(f"trainer.probe_sets: the score {value!r} in {path} is no number; correct it") from None
