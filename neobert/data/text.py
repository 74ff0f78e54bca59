"""Documents as text: what a source of text offers, and the lane that tokenises it window by window.

A reader yields records in an order that depends on nothing but its cursor, so a window is read again from the cursor
that opened it. A text longer than `max_document_chars` is cut at white space into consecutive documents; the lane's
state then holds, beside the cursor, how many characters of the next record are already used.
"""

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from neobert.data.errors import DataError
from neobert.data.lanes import IntArray, LaneSettings, State, Window, check_lane_gave_rows
from neobert.data.order import Permutation, key
from neobert.data.packing import split_documents

logger = logging.getLogger(__name__)

Encode = Callable[[list[str]], list[IntArray]]

WINDOW_CHARS = 4 << 20
"""A window of text ends after this many characters even when it has few documents; about a million tokens."""

ENCODE_DOCUMENTS = 256
"""Documents tokenised in one call when a source is read from end to end."""


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


class TextSource(Protocol):
    """The documents of one split as text."""

    fingerprint: str
    """Changes when the documents change."""

    notes: list[str]
    """What was found and chosen, for the console."""

    def records(self) -> Records:
        """All records in source order."""


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


@dataclass(kw_only=True, slots=True)
class _Reading:
    """The texts of a window while they are read."""

    cursor: State
    char: int
    texts: list[str] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    num_chars: int = 0
    ended: bool = False

    def take(self, record: Record, text: str, settings: LaneSettings) -> bool:
        """Adds the parts of a record while there is room; whether it was used up."""
        while self.char < len(text) and not self.is_full(settings):
            end = cut_end(text, self.char, settings.max_document_chars)
            self.texts.append(text[self.char : end])
            self.documents.append(record.document)
            self.num_chars += end - self.char
            self.char = end
        if self.char < len(text):
            return False
        self.char = 0
        return True

    def is_full(self, settings: LaneSettings) -> bool:
        return len(self.texts) >= settings.window_documents or self.num_chars >= WINDOW_CHARS


class TextLane:
    """A reader's documents, tokenised and packed in windows of neighbouring documents."""

    def __init__(self, reader: Reader, encode: Encode, settings: LaneSettings, lane: int) -> None:
        self._reader, self._encode, self._settings, self._lane = reader, encode, settings, lane

    def start(self) -> State:
        counters = {"used": 0, "bad": 0, "bad_in_epoch": 0, "skipped": 0, "dropped": 0}
        return {"epoch": 0, "window": 0, "row": 0, "cursor": self._reader.start(), "char": 0, **counters}

    def open(self, state: State) -> Window:
        settings, epoch = self._settings, state["epoch"]
        # The same records are bad in every epoch: they are named once.
        counts = RecordCounts(
            max_bad=settings.max_bad_records,
            where=f"lane {self._lane} in an epoch",
            log=epoch == 0,
            bad=state["bad_in_epoch"],
        )
        reading = self._read(state, counts)
        tokens = self._encode(reading.texts) if reading.texts else []
        lengths = np.array([len(document) for document in tokens], dtype=np.int64)
        pieces, num_dropped = split_documents(
            lengths, settings.max_seq_length, settings.min_length, truncate=settings.truncate
        )
        next_state = {
            "epoch": epoch,
            "window": state["window"] + 1,
            "row": 0,
            "cursor": reading.cursor,
            "char": reading.char,
            "used": state["used"] + len(pieces),
            "bad": state["bad"] + counts.bad - state["bad_in_epoch"],
            "bad_in_epoch": counts.bad,
            "skipped": state["skipped"] + counts.skipped,
            "dropped": state["dropped"] + num_dropped,
        }
        if reading.ended:
            check_lane_gave_rows(self._lane, next_state["used"])
            next_state |= {"epoch": epoch + 1, "window": 0, "cursor": self._reader.start(), "used": 0}
            next_state |= {"bad_in_epoch": 0}
        return Window(
            rows=settings.plan(pieces, key(settings.seed, "rows", self._lane, epoch, state["window"])),
            get=lambda piece: tokens[piece.document][piece.start : piece.start + piece.length],
            documents=np.array(reading.documents, dtype=np.int64),
            next_state=next_state,
        )

    def _read(self, state: State, counts: RecordCounts) -> _Reading:
        reading = _Reading(cursor=state["cursor"], char=state["char"])
        with closing(self._reader.read(state["epoch"], reading.cursor)) as records:
            for record in records:
                if record.text is None:
                    counts.add(record)
                elif not reading.take(record, record.text, self._settings):
                    return reading
                reading.cursor = record.cursor
                if reading.is_full(self._settings):
                    return reading
        reading.ended = True
        return reading


class EncodedDocument(NamedTuple):
    """A whole document of a text source as tokens."""

    document: int
    tokens: IntArray
    cursor: State
    """Where reading goes on after it."""


def encode_documents(
    records: Iterable[Record], encode: Encode, counts: RecordCounts, max_document_chars: int
) -> Iterator[EncodedDocument]:
    """Tokenises a source in its order, in batches of bounded size; texts over the limit are encoded in parts."""
    waiting: list[Record] = []
    num_chars = 0
    for record in records:
        if record.text is None:
            counts.add(record)
            continue
        waiting.append(record)
        num_chars += len(record.text)
        if len(waiting) >= ENCODE_DOCUMENTS or num_chars >= WINDOW_CHARS:
            yield from _encode_batch(waiting, encode, max_document_chars)
            waiting, num_chars = [], 0
    if waiting:
        yield from _encode_batch(waiting, encode, max_document_chars)


def _encode_batch(records: list[Record], encode: Encode, max_document_chars: int) -> Iterator[EncodedDocument]:
    parts: list[str] = []
    counts: list[int] = []
    for record in records:
        texts = list(cut_text(record.text or "", max_document_chars))
        parts += texts
        counts.append(len(texts))
    tokens = iter(encode(parts))
    for record, count in zip(records, counts):
        pieces: list[Any] = [next(tokens) for _ in range(count)]
        yield EncodedDocument(record.document, pieces[0] if count == 1 else np.concatenate(pieces), record.cursor)
