"""The two kinds of document streams: tokens with random access, and text that is tokenised on the way.

Both take a bounded number of tokens at a time, so a window fits into memory however large its documents are: a document
that is too large goes on in the next take, at the token or character where the state says, and nothing is lost.
"""

from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from neobert.data.lanes import LaneSettings, State, Taken
from neobert.data.network import with_retries
from neobert.data.order import Permutation, key
from neobert.data.packing import SPECIALS_PER_SEGMENT
from neobert.data.text import WINDOW_CHARS, BadShard, Encode, Reader, Record, RecordCounts, cut_end
from neobert.secrets import build_logger

logger = build_logger(__name__)

WINDOW_TOKENS = 1 << 20
"""A take of indexed documents ends after this many tokens even when it has few documents."""

_BYTES_PER_TOKEN = 4


class IndexedTokens(Protocol):
    """Tokenised documents with random access."""

    def lengths(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of these documents, special tokens not counted."""

    def content(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Tokens [start, stop) of a document without special tokens."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class IndexedStream:
    """Documents [first, last) of an indexed store, in one permutation of all of them per epoch.

    Lane v of V owns the permuted places v, v + V, v + 2V, ... The state's `position` counts these places, and `offset`
    is the token at which the document there goes on.
    """

    store: IndexedTokens
    settings: LaneSettings
    lane: int
    num_lanes: int
    first: int
    last: int
    num_tokens: int = 0
    """Of the whole stretch, for `size`."""

    source: int = 0
    seed: int | None = None
    """Of the permutation; None is the seed of the settings."""

    @property
    def size(self) -> int:
        return self.num_tokens * _BYTES_PER_TOKEN // self.num_lanes

    @property
    def num_places(self) -> int:
        """Documents of this lane."""
        return (self.last - self.first - self.lane + self.num_lanes - 1) // self.num_lanes

    def start(self) -> State:
        return {"epoch": 0, "position": 0, "offset": 0}

    def take(self, state: State, max_documents: int) -> Taken:
        epoch, position, done = state["epoch"], state["position"], state["offset"]
        places = np.arange(position, min(self.num_places, position + max_documents)) * self.num_lanes + self.lane
        documents = self._permute(places, epoch) + self.first
        lengths = self.store.lengths(documents)
        lengths[:1] -= done
        lengths, rest = self._limit_tokens(lengths)
        documents = documents[: len(lengths)]
        starts = np.zeros(len(lengths), dtype=np.int64)
        starts[:1] = done
        end = position + len(lengths) - (rest > 0)
        next_state = {"epoch": epoch, "position": end, "offset": 0}
        if rest:
            next_state["offset"] = rest + (done if len(lengths) == 1 else 0)
        ended = end == self.num_places
        return Taken(
            lengths=lengths,
            get=lambda item, start, length: self.store.content(documents[item], start, start + length),
            documents=documents,
            sources=np.full(len(lengths), self.source),
            starts=starts,
            next_state={"epoch": epoch + 1, "position": 0, "offset": 0} if ended else next_state,
            ended=ended,
        )

    def _permute(self, places: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        if not self.settings.shuffle:
            return places
        seed = self.settings.seed if self.seed is None else self.seed
        return Permutation(self.last - self.first, key(seed, "documents", epoch))(places)

    def _limit_tokens(self, lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """The first documents that together have `WINDOW_TOKENS` tokens.

        The last of them is cut after a whole number of pieces; the second value is how many of its tokens were taken,
        or 0 when it was not cut.
        """
        content = self.settings.max_seq_length - SPECIALS_PER_SEGMENT
        truncate = self.settings.truncate
        ends = np.cumsum(np.minimum(lengths, content) if truncate else lengths)
        if not len(ends) or ends[-1] <= WINDOW_TOKENS:
            return lengths, 0
        last = int(np.searchsorted(ends, WINDOW_TOKENS))
        before = int(ends[last - 1]) if last else 0
        taken = -(-(WINDOW_TOKENS - before) // content) * content
        kept = lengths[: last + 1].copy()
        if truncate or taken >= kept[last]:
            return kept, 0
        kept[last] = taken
        return kept, taken


@dataclass(kw_only=True, slots=True)
class _Reading:
    """The texts of a take while they are read."""

    cursor: State
    char: int
    max_documents: int
    max_document_chars: int
    texts: list[str] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    num_chars: int = 0
    skipped_shards: list[int] = field(default_factory=list)
    ended: bool = False

    def add(self, record: Record, text: str) -> bool:
        """Adds the parts of a record while there is room; whether it was used up."""
        while self.char < len(text) and not self.is_full:
            end = cut_end(text, self.char, self.max_document_chars)
            self.texts.append(text[self.char : end])
            self.documents.append(record.document)
            self.num_chars += end - self.char
            self.char = end
        if self.char < len(text):
            return False
        self.char = 0
        return True

    @property
    def is_full(self) -> bool:
        return len(self.texts) >= self.max_documents or self.num_chars >= WINDOW_CHARS


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TextStream:
    """A reader's documents, tokenised a window at a time.

    A text longer than `max_document_chars` is cut at white space into consecutive documents; the state then holds,
    beside the reader's cursor, how many characters of the next record are already used.
    """

    reader: Reader
    encode: Encode
    settings: LaneSettings
    lane: int
    source: int = 0
    network_retries: int = 0
    skip_bad_shards: bool = False
    log: bool = True
    """Whether bad records and shards are named, each once."""

    @property
    def size(self) -> int:
        return self.reader.size

    def start(self) -> State:
        counters = {"bad": 0, "bad_in_epoch": 0, "skipped": 0, "skipped_shards": []}
        return {"epoch": 0, "cursor": self.reader.start(), "char": 0, **counters}

    def take(self, state: State, max_documents: int) -> Taken:
        where = f"lane {self.lane} in an epoch"

        def read() -> tuple[_Reading, RecordCounts]:
            return self._read(state, max_documents, where)

        reading, counts = with_retries(read, retries=self.network_retries, where=where)
        tokens = self.encode(reading.texts) if reading.texts else []
        next_state = {
            "epoch": state["epoch"],
            "cursor": reading.cursor,
            "char": reading.char,
            "bad": state["bad"] + counts.bad - state["bad_in_epoch"],
            "bad_in_epoch": counts.bad,
            "skipped": state["skipped"] + counts.skipped,
            "skipped_shards": reading.skipped_shards,
        }
        if reading.ended:
            next_state |= {"epoch": state["epoch"] + 1, "cursor": self.reader.start(), "char": 0, "bad_in_epoch": 0}
        return Taken(
            lengths=np.array([len(document) for document in tokens], dtype=np.int64),
            get=lambda item, start, length: tokens[item][start : start + length],
            documents=np.array(reading.documents, dtype=np.int64),
            sources=np.full(len(tokens), self.source),
            starts=np.zeros(len(tokens), dtype=np.int64),
            next_state=next_state,
            ended=reading.ended,
        )

    def _read(self, state: State, max_documents: int, where: str) -> tuple[_Reading, RecordCounts]:
        settings = self.settings
        # The same records are bad in every epoch: they are named once.
        log, bad = self.log and state["epoch"] == 0, state["bad_in_epoch"]
        counts = RecordCounts(max_bad=settings.max_bad_records, where=where, log=log, bad=bad)
        reading = _Reading(
            cursor=state["cursor"],
            char=state["char"],
            max_documents=max_documents,
            max_document_chars=settings.max_document_chars,
            skipped_shards=list(state["skipped_shards"]),
        )
        while True:
            try:
                self._read_on(reading, state["epoch"], counts)
                return reading, counts
            except BadShard as error:
                if not self.skip_bad_shards:
                    raise
                if self.log:
                    logger.warning("passed over, now and in every epoch: %s", error)
                reading.skipped_shards.append(error.shard)
                reading.cursor, reading.char = error.next_cursor, 0

    def _read_on(self, reading: _Reading, epoch: int, counts: RecordCounts) -> None:
        skip = frozenset(reading.skipped_shards)
        with closing(self.reader.read(epoch, reading.cursor, skip)) as records:
            for record in records:
                if record.text is None:
                    counts.add(record)
                elif not reading.add(record, record.text):
                    return
                reading.cursor = record.cursor
                if reading.is_full:
                    return
        reading.ended = True
