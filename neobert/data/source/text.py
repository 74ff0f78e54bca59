"""Documents as text: what a source of text offers to lanes.

A reader yields records in an order that depends on nothing but its cursor, so a window is read again from the cursor
that opened it.
"""

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from neobert.config.schema_data import MAX_RECORD_BYTES
from neobert.data.fingerprint import combine
from neobert.data.lazy import Lazy
from neobert.data.rows.lanes import IntArray, State
from neobert.data.rows.order import Permutation, key
from neobert.errors import DataError
from neobert.secrets import build_logger

logger = build_logger(__name__)

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
    """Why the entry cannot be read, starting with its location; counted as bad. None when it can."""

    cursor: State
    """Where reading continues after this entry."""


Records = Generator[Record, None, None]


class Span(NamedTuple):
    """Documents of a source that follow one another in its own order, between two cursors of the source.

    Its text is a part of fingerprints: the names of the fields stay.
    """

    after: State | None = None
    """Starts after the document with this cursor; None: at the first."""

    until: State | None = None
    """Ends with the document that has this cursor; None: with the last."""

    @property
    def is_whole(self) -> bool:
        return self == WHOLE

    def beyond(self, cursor: State | None) -> "Span":
        """What is left of it after the document with this cursor; None: all of it."""
        return self if cursor is None else self._replace(after=cursor)

    def numbers(self, name: str, size: int) -> tuple[int, int]:
        """First document, and the one after the last, where a cursor is `{name: documents before it}`.

        >>> Span(after={"position": 2}).numbers("position", 5)
        (2, 5)
        """
        return self.after[name] if self.after else 0, self.until[name] if self.until else size

    def shards(self, num_shards: int) -> Sequence[tuple[int, "Span"]]:
        """Every shard that it touches, and which part of the shard, where a cursor is `{"shard": number, "position":
        cursor in the shard}`.

        >>> [number for number, _ in Span(after={"shard": 1, "position": None}).shards(3)]
        [1, 2]
        """
        first, after = (0, None) if self.after is None else (self.after["shard"], self.after["position"])
        last, until = num_shards, None
        if self.until is not None:
            until = self.until["position"]
            last = self.until["shard"] + (until is not None)

        def part(index: int) -> tuple[int, Span]:
            number = first + index
            return number, Span(after if number == first else None, until if number == last - 1 else None)

        return Lazy(max(0, last - first), part)


WHOLE = Span()

STREAM_LANES = 16
"""Lanes of a stream when `dataset.num_lanes` is null, the data is large enough and no more processes read it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """How documents are dealt to lanes."""

    seed: int
    num_lanes: int | None
    """None: the source chooses."""

    shuffle: bool = True
    """False: shards and documents keep the order of the source."""

    most: int = STREAM_LANES
    """Lanes of a stream that is large enough, where it chooses."""

    exact: bool = False
    """True: exactly `num_lanes` readers even where the source has fewer shards to deal. Lanes that have a shard in
    common then take every n-th record of it."""


class LaneReader(Protocol):
    """One lane's part of a text source, in an order of its own for every epoch."""

    size: int
    """About how many bytes of text it has, comparable between kinds of sources; 0 when unknown."""

    def start(self) -> State:
        """The cursor at the start of an epoch."""

    def read(self, epoch: int, cursor: State, skip: frozenset[int] = frozenset()) -> Records:
        """The records of an epoch from `cursor` on.

        Args:
            skip: numbers of shards to skip.

        Raises:
            BadShard: a shard cannot be opened, decompressed or decoded.
        """


class TooLong(ValueError):
    """A record of more bytes than `dataset.max_record_bytes`."""

    def __init__(self, num_bytes: int, limit: int) -> None:
        super().__init__(f"the record has {num_bytes:,} bytes, and dataset.max_record_bytes is {limit:,}")


def check_length(text: str, max_record_bytes: int) -> None:
    """Raises where a text is too long.

    Raises:
        TooLong: it has more than `max_record_bytes` bytes.
    """
    if len(text) * 4 > max_record_bytes and (size := len(text.encode("utf-8", "surrogatepass"))) > max_record_bytes:
        raise TooLong(size, max_record_bytes)


def add_limit(fingerprint: str, max_record_bytes: int) -> str:
    """The fingerprint of the documents of data with this fingerprint: which records are too long is a part of it."""
    if max_record_bytes == MAX_RECORD_BYTES:  # As in the fingerprints that were made before there was a limit.
        return fingerprint
    return combine(
        [fingerprint], lambda parts: "sha256:" + hashlib.sha256(f"{parts[0]}\0{max_record_bytes}".encode()).hexdigest()
    )


class ShardFault(DataError):
    """What a shard raises when it cannot be opened, decompressed or decoded."""


class BadShard(DataError):
    """A shard that cannot be read, and where reading continues without the rest of it."""

    def __init__(self, message: str, *, shard: int, next_cursor: State) -> None:
        super().__init__(message)
        self.shard, self.next_cursor = shard, next_cursor


class Shard(Protocol):
    """A stretch of a source that is read from its start to its end, usually a file."""

    number: int
    """Its number in the source; ranges of one file have the same."""

    size: int

    def read(self, position: State | None) -> Records:
        """Its records after `position` (None: all); a record's cursor is the position after it.

        Raises:
            ShardFault: it cannot be read.
        """


class ShardReader:
    """Reads shards one after the other, in an order keyed by (seed, lane, epoch), or in the order given."""

    def __init__(self, shards: Sequence[Shard], sharding: Sharding, lane: int) -> None:
        self._shards, self._sharding, self._lane = shards, sharding, lane
        self.size = sum(shard.size for shard in shards)

    def start(self) -> State:
        return {"shard": 0, "position": None}

    def read(self, epoch: int, cursor: State, skip: frozenset[int] = frozenset()) -> Records:
        shards, sharding = self._shards, self._sharding
        if sharding.shuffle:
            permute = Permutation(len(shards), key(sharding.seed, "shards", self._lane, epoch))
            shards = [shards[number] for number in permute(np.arange(len(shards))).tolist()]
        yield from read_shards(shards, cursor, skip)


class EveryNth:
    """One of `count` lanes that use one reader: of every `count` records it takes the one at index `turn`.

    The cursor is `{"cursor": of the reader, "seen": records since the start of the epoch, modulo count}`.
    """

    def __init__(self, reader: LaneReader, turn: int, count: int) -> None:
        self._reader, self._turn, self._count = reader, turn, count
        self.size = reader.size // count

    def start(self) -> State:
        return {"cursor": self._reader.start(), "seen": 0}

    def read(self, epoch: int, cursor: State, skip: frozenset[int] = frozenset()) -> Records:
        seen = cursor["seen"]
        try:
            for record in self._reader.read(epoch, cursor["cursor"], skip):
                mine, seen = seen == self._turn, (seen + 1) % self._count
                if mine:
                    yield record._replace(cursor={"cursor": record.cursor, "seen": seen})
        except BadShard as bad:
            after = {"cursor": bad.next_cursor, "seen": seen}
            raise BadShard(str(bad), shard=bad.shard, next_cursor=after) from bad


def read_shards(shards: Sequence[Shard], cursor: State, skip: frozenset[int] = frozenset()) -> Records:
    """Records of shards in the order given, from the cursor `{"shard": index, "position": position in it}` on.

    Raises:
        BadShard: one of them cannot be read.
    """
    position = cursor["position"]
    for index in range(cursor["shard"], len(shards)):
        if shards[index].number not in skip:
            try:
                for record in shards[index].read(position):
                    yield record._replace(cursor={"shard": index, "position": record.cursor})
            except ShardFault as fault:
                after = {"shard": index + 1, "position": None}
                raise BadShard(str(fault), shard=shards[index].number, next_cursor=after) from fault
        position = None


def cut_end(text: str, start: int, max_chars: int) -> int:
    """End of the part of `text` that starts at `start`: at most `max_chars` characters, after white space if any."""
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
    last_problem: str = ""

    def add(self, record: Record) -> None:
        """Counts a record without text.

        Raises:
            DataError: more than `max_bad` records cannot be read.
        """
        if record.problem is None:
            self.skipped += 1
        else:
            self.add_bad(record.problem)

    def add_bad(self, problem: str) -> None:
        """Counts a record that cannot be read.

        Args:
            problem: why, starting with its location.

        Raises:
            DataError: more than `max_bad` records cannot be read.
        """
        self.bad, self.last_problem = self.bad + 1, problem
        if self.bad > self.max_bad:
            raise DataError(
                f"dataset.max_bad_records: {self.max_bad}, but {self.bad} records of {self.where} cannot be read, the "
                f"last one at {problem}; fix the file, or raise dataset.max_bad_records to skip them"
            )
        if self.log:
            logger.warning("bad record skipped: %s", problem)
