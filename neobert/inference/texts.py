"""Texts for the scripts: whatever training reads, by path or name, and the standard input.

The source is one that `neobert.data` knows: JSON lines, plain text, CSV or Parquet (files, folders, patterns, local or
remote), folders of `save_to_disk`, data sets of the hub. Records that cannot be read are skipped and counted, and
the first ones are named with their file and line.
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from neobert.data.rows.lanes import State
from neobert.data.source.documents import TextDocuments
from neobert.data.source.formats import list_splits
from neobert.data.source.lines import BOM
from neobert.data.source.spec import describe_source
from neobert.data.source.splits import check_split
from neobert.data.source.text import Span
from neobert.errors import OR_SKIP_SHARD, DataError

STDIN = "-"

NAMED_RECORDS = 5
"""Bad records that are named; the others are counted."""

# What a config calls by its key is an argument of a script.
_WORDING = (
    (OR_SKIP_SHARD, ""),
    ("dataset.text_column is null", "--text-column is not set"),
    ("dataset.text_column", "--text-column"),
    ("dataset.path", "input"),
    ("dataset.name", "input"),
)


class Text(NamedTuple):
    """One text of the input."""

    number: int
    """Its index among all records of the input, from 0; those without a text count."""

    text: str
    cursor: State
    """Where reading continues after it."""


class InputRecord(NamedTuple):
    """One record of the input; see `Text`."""

    number: int
    text: str | None
    """None for a record without text, and for one that cannot be read."""

    cursor: State
    problem: str | None = None
    """Why it cannot be read, with its location."""


class Texts:
    """The texts of an input in their order, and what was skipped."""

    def __init__(self, source: TextDocuments, label: str) -> None:
        self._source, self.label = source, label
        self.fingerprint = source.fingerprint
        self.notes = [*source.notes, *(f"warning: {text}" for text in source.inventory.warnings())]
        self.num_records = self.num_bad = self.num_skipped = 0
        self.named: list[str] = []
        """The first bad records, each with its location."""

    @property
    def total(self) -> int | None:
        """Number of records where it is known."""
        return self._source.count()

    def read(self, after: State | None = None, num_records: int = 0) -> Iterator[Text]:
        """The texts after a cursor, which has so many records before it."""
        for record in self.records(after, num_records):
            if record.text is not None:
                yield Text(record.number, record.text, record.cursor)

    def records(self, after: State | None = None, num_records: int = 0) -> Iterator[InputRecord]:
        """All records after a cursor, which has so many records before it, those without a text too."""
        self.num_records = num_records
        try:
            for record in self._source.records(Span(after=after)):
                self.num_records += 1
                if record.problem is not None:
                    self.num_bad += 1
                    if len(self.named) < NAMED_RECORDS:
                        self.named.append(record.problem)
                elif record.text is None:
                    self.num_skipped += 1
                yield InputRecord(self.num_records - 1, record.text, record.cursor, record.problem)
        except DataError as error:
            raise _reworded(error) from error

    def describe_gaps(self, what: str = "skipped") -> list[str]:
        """Sentences about records that gave no text, and `what` became of them; none when there are none."""
        lines = [f"{what}: {self.num_skipped:,} records without text"] if self.num_skipped else []
        if self.num_bad:
            lines.append(f"{what}: {self.num_bad:,} records that cannot be read, the first ones:")
            lines += [f"  {problem}" for problem in self.named]
        return lines


@contextmanager
def open_texts(path: str, *, text_column: str | None = None, split: str | None = None) -> Iterator[Texts]:
    """The texts of a path or a name; `-` reads the standard input, as JSON lines where it starts with a brace.

    Raises:
        DataError: there is nothing to read, or it has several splits and none is named.
    """
    with tempfile.TemporaryDirectory() as folder:
        path_or_name = str(_spool(sys.stdin.buffer, Path(folder))) if path == STDIN else path
        try:
            yield _open(path_or_name, "standard input" if path == STDIN else path, text_column, split)
        except DataError as error:
            raise _reworded(error) from error


def _open(path: str, label: str, text_column: str | None, split: str | None) -> Texts:
    splits = list_splits(describe_source(path, text_column=text_column))
    if split is None and len(splits) > 1:
        raise DataError(f"{label} has the splits {', '.join(splits)}; choose one with --split, or name a file")
    name = split or next(iter(splits))
    check_split(list(splits), name, "--split")
    return Texts(splits[name](None).as_text(label), label)


def _spool(stream: BinaryIO, folder: Path) -> Path:
    """A file with what a stream holds: sources are read by cursor, and twice where the column is to be found."""
    first = b""
    while not first.strip() and (line := stream.readline(1 << 20)):
        first += line
    if not first.strip():
        raise DataError("the standard input is empty; pipe text or JSON lines into it")
    file = folder / ("stdin.jsonl" if first.removeprefix(BOM).lstrip().startswith(b"{") else "stdin.txt")
    with file.open("wb") as out:
        out.write(first)
        while block := stream.read(1 << 20):
            out.write(block)
    return file


def _reworded(error: DataError) -> DataError:
    message = str(error)
    for key, flag in _WORDING:
        message = message.replace(key, flag)
    return DataError(message)
