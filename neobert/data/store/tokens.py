"""Tokens on disk as documents: read by lanes, set apart for evaluation, or written to another folder."""

from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neobert.data.rows.lanes import DocumentStream, LaneSettings, State
from neobert.data.rows.packing import SPECIALS_PER_SEGMENT, piece_lengths
from neobert.data.rows.streams import IndexedStream
from neobert.data.source.documents import Documents, FirstDocuments, StreamSettings, count_slots
from neobert.data.source.text import WHOLE, Encode, RecordCounts, Sharding, Span
from neobert.data.store.arrow import TokenStore, choose_indexed_lanes
from neobert.data.store.encode import EncodedDocument

_SCAN = 1 << 16


class StoredTokens(Documents):
    """The documents of a `TokenStore`; a cursor is `{"row": the next row}`."""

    is_tokenised = True
    is_indexed = True

    def __init__(self, store: TokenStore) -> None:
        self.store = store
        self.fingerprint = store.fingerprint
        self.notes = store.notes

    def count(self, span: Span = WHOLE) -> int:
        first, last = self._rows(span)
        return self.store.document_at(last) - self.store.document_at(first)

    def size(self, span: Span, settings: LaneSettings) -> tuple[int, int]:
        first, last = self._rows(span)
        limits = (settings.max_seq_length, settings.min_length)
        _, _, sizes, _ = piece_lengths(self.store.all_lengths()[first:last], *limits, truncate=settings.truncate)
        return int(sizes.sum()) + SPECIALS_PER_SEGMENT * len(sizes), len(sizes)

    def slice(self, first: int, last: int | None, *, size: int | None = None, is_cap: bool = False) -> Span:
        return Span(self._cursor(first) if first else None, None if last is None else self._cursor(last))

    def first(
        self, span: Span, settings: LaneSettings, encode: Encode, num_documents: int | None, num_slots: int | None
    ) -> FirstDocuments:
        # Their tokens stay on disk.
        store = self.store
        first, last = self._rows(span)
        rows, lengths = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        ranks, slots_done = rows, 0
        for begin in range(first, last, _SCAN):
            found = np.arange(begin, min(last, begin + _SCAN))
            sizes = store.lengths(found)
            slots = count_slots(sizes, settings)
            usable = np.flatnonzero(slots)
            if num_slots is not None:
                usable = usable[slots_done + np.cumsum(slots[usable]) - slots[usable] < num_slots]
            # Where long documents are stored in pieces, all pieces of a document count as one.
            rows, lengths = np.append(rows, found[usable]), np.append(lengths, sizes[usable])
            ranks = np.unique(store.documents_of(rows), return_inverse=True)[1]
            if num_documents is not None:
                kept = ranks < num_documents
                rows, lengths, is_full = rows[kept], lengths[kept], bool(len(ranks) and ranks[-1] >= num_documents)
                ranks = ranks[kept]
            else:
                is_full = False
            slots_done = int(count_slots(lengths, settings).sum())
            if is_full or (num_slots is not None and slots_done >= num_slots):
                break
        cursor = self._cursor(int(store.documents_of(rows[-1:])[0]) + 1) if len(rows) else None
        return FirstDocuments(lengths, lambda number: store.content(int(rows[number])), ranks, cursor)

    def open(
        self, span: Span, encode: Encode, counts: RecordCounts, max_document_chars: int, num_ahead: int = 0
    ) -> Generator[EncodedDocument, None, None]:
        row, last = self._rows(span)
        for end in self._ends(row, last):
            pieces = [self.store.content(number) for number in range(row, end)]
            tokens = np.concatenate(pieces).astype(np.int32, copy=False)
            yield EncodedDocument(row, tokens, {"row": end}, counts.bad, counts.skipped)
            row = end

    def choose_num_lanes(self, span: Span, settings: LaneSettings) -> int:
        first, last = self._rows(span)
        return choose_indexed_lanes(last - first, settings.window_documents)

    def streams(self, span: Span, sharding: Sharding, settings: StreamSettings) -> Callable[[int], DocumentStream]:
        first, last = self._rows(span)
        return lambda lane: IndexedStream(
            store=self.store,
            settings=settings.lanes,
            lane=lane,
            num_lanes=sharding.num_lanes or self.choose_num_lanes(span, settings.lanes),
            first=first,
            last=last,
            num_tokens=settings.num_tokens,
            source=settings.source,
            seed=sharding.seed,
        )

    def token_blocks(self, max_tokens: int) -> Iterator[NDArray[Any]]:
        return self.store.token_blocks(max_tokens)

    def _rows(self, span: Span) -> tuple[int, int]:
        return span.numbers("row", len(self.store))

    def _cursor(self, number: int) -> State:
        """After so many documents."""
        return {"row": self.store.row_of(number)}

    def _ends(self, row: int, last: int) -> Iterator[int]:
        """For each document from `row` on: the row after its last one."""
        numbers = self.store.document_numbers
        if numbers is None:
            yield from range(row + 1, last + 1)
            return
        for begin in range(row, last, _SCAN):
            block = numbers[begin : min(last, begin + _SCAN) + 1]
            yield from (np.flatnonzero(block[1:] != block[:-1]) + begin + 1).tolist()
        if row < last and last == len(numbers):
            yield last
