"""The two kinds of document streams: tokens with random access, and text that is tokenised on the way.

Both take a bounded number of tokens at a time, so a window fits into memory however large its documents are: a document
that is too large continues in the next take, at the token or character where the state says, and nothing is lost.

`MixtureStream` makes one stream of several sources. Every document slot of a lane draws its source from a hash of
(seed, lane, epoch, slot), and the lane keeps one state for each source: that is all there is to remember. Two ways of
mixing:

    with weights     slots fall to the sources in these proportions; a source that ends starts its next epoch at once
    no weights       each document once per epoch; slots fall to the sources in proportion to their sizes, so that they
                     run out at about the same time; what is left of a longer one follows alone

Worked example, weights 3 and 1, five slots: hashes .12 .80 .55 .91 .07 of [0, 1) fall to sources 0 1 0 1 0, so the
window holds the next three documents of source 0 and the next two of source 1.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from neobert.config.schema import DatasetSection
from neobert.data.rows.lanes import DocumentBatch, DocumentStream, RowOrder, State
from neobert.data.rows.order import Permutation, extend_keys, key, uniforms
from neobert.data.rows.packing import SPECIALS_PER_SEGMENT
from neobert.data.source.network import with_retries
from neobert.data.source.text import WINDOW_CHARS, BadShard, Encode, LaneReader, Record, RecordCounts, cut_end
from neobert.errors import DataError
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

    Lane v of V owns the permuted indices v, v + V, v + 2V, ... The state's `position` counts them, and `offset`
    is the token at which the document there continues.
    """

    store: IndexedTokens
    order: RowOrder
    lane: int
    num_lanes: int
    first: int
    last: int
    num_tokens: int = 0
    """Of the whole stretch, for `size`."""

    source: int = 0
    seed: int | None = None
    """Of the permutation; None is the seed of the order."""

    @property
    def size(self) -> int:
        return self.num_tokens * _BYTES_PER_TOKEN // self.num_lanes

    @property
    def num_documents(self) -> int:
        """Documents of this lane."""
        return (self.last - self.first - self.lane + self.num_lanes - 1) // self.num_lanes

    def start(self) -> State:
        return {"epoch": 0, "position": 0, "offset": 0}

    def take(self, state: State, max_documents: int) -> DocumentBatch:
        epoch, position, done = state["epoch"], state["position"], state["offset"]
        indices = np.arange(position, min(self.num_documents, position + max_documents)) * self.num_lanes + self.lane
        documents = self._permute(indices, epoch) + self.first
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
        ended = end == self.num_documents
        return DocumentBatch(
            lengths=lengths,
            get=lambda item, start, length: self.store.content(documents[item], start, start + length),
            documents=documents,
            sources=np.full(len(lengths), self.source),
            starts=starts,
            next_state={"epoch": epoch + 1, "position": 0, "offset": 0} if ended else next_state,
            ended=ended,
        )

    def _permute(self, indices: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        if not self.order.shuffle:
            return indices
        seed = self.order.seed if self.seed is None else self.seed
        return Permutation(self.last - self.first, key(seed, "documents", epoch))(indices)

    def _limit_tokens(self, lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """The first documents that together have `WINDOW_TOKENS` tokens.

        The last of them is cut after a whole number of pieces; the second value is how many of its tokens were read,
        or 0 when it was not cut.
        """
        content = self.order.max_seq_length - SPECIALS_PER_SEGMENT
        truncate = self.order.truncate
        ends = np.cumsum(np.minimum(lengths, content) if truncate else lengths)
        if not len(ends) or ends[-1] <= WINDOW_TOKENS:
            return lengths, 0
        last = int(np.searchsorted(ends, WINDOW_TOKENS))
        before = int(ends[last - 1]) if last else 0
        read = -(-(WINDOW_TOKENS - before) // content) * content
        kept = lengths[: last + 1].copy()
        if truncate or read >= kept[last]:
            return kept, 0
        kept[last] = read
        return kept, read


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

    reader: LaneReader
    encode: Encode
    order: RowOrder
    section: DatasetSection
    lane: int
    source: int = 0
    log: bool = True
    """Whether bad records and shards are named, each once."""

    @property
    def size(self) -> int:
        return self.reader.size

    def start(self) -> State:
        counters = {"bad": 0, "bad_in_epoch": 0, "skipped": 0, "skipped_shards": []}
        return {"epoch": 0, "cursor": self.reader.start(), "char": 0, **counters}

    def take(self, state: State, max_documents: int) -> DocumentBatch:
        where = f"lane {self.lane} in an epoch"

        def read() -> tuple[_Reading, RecordCounts]:
            return self._read(state, max_documents, where)

        reading, counts = with_retries(read, retries=self.section.network_retries, where=where)
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
        return DocumentBatch(
            lengths=np.array([len(document) for document in tokens], dtype=np.int64),
            get=lambda item, start, length: tokens[item][start : start + length],
            documents=np.array(reading.documents, dtype=np.int64),
            sources=np.full(len(tokens), self.source),
            starts=np.zeros(len(tokens), dtype=np.int64),
            next_state=next_state,
            ended=reading.ended,
        )

    def _read(self, state: State, max_documents: int, where: str) -> tuple[_Reading, RecordCounts]:
        # The same records are bad in every epoch: they are named once.
        log, bad = self.log and state["epoch"] == 0, state["bad_in_epoch"]
        counts = RecordCounts(max_bad=self.section.max_bad_records, where=where, log=log, bad=bad)
        reading = _Reading(
            cursor=state["cursor"],
            char=state["char"],
            max_documents=max_documents,
            max_document_chars=self.order.max_document_chars,
            skipped_shards=list(state["skipped_shards"]),
        )
        while True:
            try:
                self._read_on(reading, state["epoch"], counts)
                return reading, counts
            except BadShard as error:
                if self.section.on_bad_shard != "skip":
                    raise
                if self.log:
                    logger.warning("skipped, now and in every epoch: %s", error)
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


MAX_EMPTY_EPOCHS = 100
"""Epochs in a row without a document, of a source that had some: then nothing will come."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MixtureStream:
    """The documents of several streams in turn."""

    streams: Sequence[DocumentStream]
    weights: Sequence[float] | None
    """One for each stream; None reads each document once per epoch."""

    labels: Sequence[str]
    """Names of the sources, for errors."""

    seed: int
    lane: int

    @property
    def size(self) -> int:
        return sum(stream.size for stream in self.streams)

    def start(self) -> State:
        return self._epoch_start(0, [stream.start() for stream in self.streams])

    def take(self, state: State, max_documents: int) -> DocumentBatch:
        chosen = self._choose(state, max_documents)
        batches: list[DocumentBatch] = []
        positions: list[NDArray[np.int64]] = []
        owed, ended, states = list(state["owed"]), set(state["ended"]), list(state["sources"])
        for number in range(len(self.streams)):
            slots = np.flatnonzero(chosen == number)
            parts, states[number], owed[number] = self._take_from(number, states[number], owed[number] + len(slots))
            if self.weights is None and parts and parts[-1].ended:
                ended.add(number)
                owed[number] = 0
            batches += parts
            count = sum(len(part.lengths) for part in parts)
            # Documents are at their slots; those that an earlier window still owed come after them.
            positions.append(np.concatenate([slots, max_documents + np.arange(count)])[:count])
        slot = state["slot"] + max_documents
        is_over = len(ended) == len(self.streams)
        next_state = {**state, "slot": slot, "owed": owed, "ended": sorted(ended), "sources": states}
        return _join(
            batches,
            np.argsort(np.concatenate(positions), kind="stable"),
            next_state=self._epoch_start(state["epoch"] + 1, states) if is_over else next_state,
            ended=is_over,
        )

    def _epoch_start(self, epoch: int, states: list[State]) -> State:
        return {"epoch": epoch, "slot": 0, "owed": [0] * len(states), "ended": [], "sources": states}

    def _choose(self, state: State, count: int) -> NDArray[np.int64]:
        """The source of each of the next slots."""
        weights = np.array(self.weights if self.weights is not None else self._sizes(), dtype=np.float64)
        weights[state["ended"]] = 0
        borders = np.cumsum(weights) / weights.sum()
        slots = np.arange(state["slot"], state["slot"] + count)
        draws = uniforms(extend_keys(key(self.seed, "mixture", self.lane, state["epoch"]), slots))
        # The last border may be a little below 1 by rounding; the last source with a weight takes what is above.
        return np.minimum(np.searchsorted(borders, draws, side="right"), int(np.flatnonzero(weights)[-1]))

    def _sizes(self) -> list[float]:
        known = [stream.size for stream in self.streams if stream.size > 0]
        usual = sum(known) / len(known) if known else 1.0
        return [float(stream.size) if stream.size > 0 else usual for stream in self.streams]

    def _take_from(self, number: int, state: State, count: int) -> tuple[list[DocumentBatch], State, int]:
        """The next `count` documents of a source; (takes, state after them, documents still owed)."""
        parts: list[DocumentBatch] = []
        stream, num_empty = self.streams[number], 0
        while count > 0:
            part = stream.take(state, count)
            parts.append(part)
            if not part.ended and len(part.lengths) < count:
                # Large documents have filled the window: the rest is owed to the next one.
                return parts, part.next_state, count - len(part.lengths)
            num_empty = 0 if len(part.lengths) else num_empty + 1
            if num_empty > MAX_EMPTY_EPOCHS or (num_empty and self.weights is not None and state == stream.start()):
                raise DataError(
                    f"dataset.mixture: {self.labels[number]} has no usable documents in lane {self.lane}; "
                    "lower dataset.num_lanes or leave it null, check its text column, or take it out"
                )
            state, count = part.next_state, count - len(part.lengths)
            if part.ended and self.weights is None:
                break
        return parts, state, count


def _join(parts: Sequence[DocumentBatch], order: NDArray[np.int64], *, next_state: State, ended: bool) -> DocumentBatch:
    """Batches side by side, their documents in the given order."""
    numbers = [np.full(len(part.lengths), number) for number, part in enumerate(parts)]
    items = [np.arange(len(part.lengths)) for part in parts]

    def joined(arrays: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        return np.concatenate([np.empty(0, dtype=np.int64), *arrays])[order].astype(np.int64)

    part_of, item_of = joined(numbers), joined(items)
    return DocumentBatch(
        lengths=joined([part.lengths for part in parts]),
        get=lambda item, start, length: parts[part_of[item]].get(int(item_of[item]), start, length),
        documents=joined([part.documents for part in parts]),
        sources=joined([part.sources for part in parts]),
        starts=joined([part.starts for part in parts]),
        next_state=next_state,
        ended=ended,
    )
