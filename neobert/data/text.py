"""Documents as text: what a source of text offers to lanes.

A reader yields records in an order that depends on nothing but its cursor, so a window is read again from the cursor
that opened it.
"""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from neobert.data.errors import DataError
from neobert.data.lanes import IntArray, State
from neobert.data.order import Permutation, key

logger = logging.getLogger(__name__)

Encode = Callable[[list[str]], list[IntArray]]

WINDOW_CHARS = 4 << 20
"""A window of text ends after this many characters even when it has few documents; about a million tokens."""


class Record(NamedTuple):
    """One entry of a text source."""

    document: int
    """Its number in the source."""

    text: str | None
    """None when the entry has no text: skipped and counted."""

    problem: str | None
    """Why the entry cannot be read, beginning with its place; counted as bad. None when it can."""

    cursor: State
    """Where reading goes on after this entry."""


Records = Generator[Record, None, None]


class Reader(Protocol):
    """One lane's share of a text source, in an order of its own for every epoch."""

    size: int
    """Amount of data in a unit that compares between lanes; 0 when unknown."""

    def start(self) -> State:
        """The cursor at the beginning of an epoch."""

    def read(self, epoch: int, cursor: State) -> Records:
        """The records of an epoch from `cursor` on."""


class Span(NamedTuple):
    """A stretch of a source in its own order, between two cursors of its records."""

    after: State | None = None
    """Begins behind this record; None: at the first."""

    until: State | None = None
    """Ends with this record; None: with the last."""


WHOLE = Span()


class TextSource(Protocol):
    """The documents of one split as text."""

    fingerprint: str
    """Changes when the documents change."""

    notes: list[str]
    """What was found and chosen, for the console."""

    def records(self, span: Span = WHOLE) -> Records:
        """Records in source order."""

    def count(self) -> int | None:
        """Number of records where it is known without reading all of them."""

    def part(self, number: int, count: int) -> Span:
        """Stretch `number` (from 0) of `count` contiguous ones of about equal size."""


class Shard(Protocol):
    """A stretch of a source that is read from its beginning to its end, usually a file."""

    size: int

    def read(self, position: State | None) -> Records:
        """Its records after `position` (None: all); a record's cursor is the position after it."""


class ShardReader:
    """Reads shards one after the other, in an order keyed by (seed, lane, epoch)."""

    def __init__(self, shards: Sequence[Shard], seed: int, lane: int) -> None:
        self._shards, self._seed, self._lane = shards, seed, lane
        self.size = sum(shard.size for shard in shards)

    def start(self) -> State:
        return {"shard": 0, "position": None}

    def read(self, epoch: int, cursor: State) -> Records:
        count = len(self._shards)
        order = Permutation(count, key(self._seed, "shards", self._lane, epoch))(np.arange(count)).tolist()
        yield from read_shards([self._shards[number] for number in order], cursor)


def read_shards(shards: Sequence[Shard], cursor: State) -> Records:
    """Records of shards in the order given, from the cursor `{"shard": place, "position": position in it}` on."""
    position = cursor["position"]
    for place in range(cursor["shard"], len(shards)):
        for record in shards[place].read(position):
            yield record._replace(cursor={"shard": place, "position": record.cursor})
        position = None


def cut_end(text: str, start: int, max_chars: int) -> int:
    """End of the part of `text` that begins at `start`: at most `max_chars` characters, after white space if any."""
    limit = start + max_chars
    if limit >= len(text):
        return len(text)
    after_space = max(text.rfind(space, start, limit) for space in (" ", "\n", "\t")) + 1
    return after_space if after_space > start else limit


def cut_text(text: str, max_chars: int) -> Iterator[str]:
    """The whole text in parts of at most `max_chars` characters."""
    start = 0
    while start < len(text):
        end = cut_end(text, start, max_chars)
        yield text[start:end]
        start = end


@dataclass(kw_only=True, slots=True)
class RecordCounts:
    """Records of one reading that gave no document."""

    max_bad: int
    where: str
    log: bool = True
    bad: int = 0
    skipped: int = 0

    def add(self, record: Record) -> None:
        """Counts a record without text.

        Raises:
            DataError: more than `max_bad` records cannot be read.
        """
        if record.problem is None:
            self.skipped += 1
            return
        self.bad += 1
        if self.bad > self.max_bad:
            raise DataError(
                f"dataset.max_bad_records: {self.max_bad}, but {self.bad} records of {self.where} cannot be read, the "
                f"last one at {record.problem}; mend the file, or raise dataset.max_bad_records to pass over them"
            )
        if self.log:
            logger.warning("bad record passed over: %s", record.problem)
