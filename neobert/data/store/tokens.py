"""Tokens on disk as documents: read by lanes, set apart for evaluation, or written to another folder."""

import hashlib
from collections.abc import Callable, Generator, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neobert.data.fingerprint import Fingerprint, digest_documents, spread
from neobert.data.rows.lanes import DocumentStream, RowOrder, State
from neobert.data.rows.packing import SPECIALS_PER_SEGMENT, piece_lengths
from neobert.data.rows.streams import IndexedStream
from neobert.data.source.documents import Documents, EncodedDocument, FirstDocuments, StreamSettings, count_slots
from neobert.data.source.text import STREAM_LANES, WHOLE, Encode, RecordCounts, Sharding, Span
from neobert.data.store.arrow import choose_indexed_lanes, load_table, read_manifest
from neobert.data.tokenizer import Tokenizer
from neobert.errors import DataError

_SAMPLE = 4096
_SCAN = 1 << 16


class TokenStore(Documents):
    """Tokenised documents on disk; a cursor is `{"row": the next row}`. [CLS] and [SEP] around a document on disk are
    not part of its content.

    Every token is compared with the vocabulary when it is read; what is read of a store may raise DataError.
    """

    is_tokenised = True
    is_indexed = True

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._folder = folder
        manifest = read_manifest(folder) or {}
        made_with = manifest.get("tokenizer_digest", tokenizer.digest)
        if made_with != tokenizer.digest:
            raise DataError(
                f"dataset.path: {folder} was made with a tokenizer of digest {made_with}, this one has "
                f"{tokenizer.digest}; name that one with tokenizer.name or tokenizer.path, or tokenise again"
            )
        self._map()
        self._cls_id, self._sep_id, self._num_ids = tokenizer.cls_id, tokenizer.sep_id, tokenizer.size
        self._all_counts: NDArray[np.int64] | None = None
        self._stripped = False
        found = self._check_sample(tokenizer)
        self._stripped = bool(manifest.get("special_tokens", found))
        self.fingerprint = self._make_fingerprint()
        self.notes = ["special tokens on disk are skipped"] if self._stripped else []

    def _map(self) -> None:
        """Maps the files into memory."""
        table = load_table(self._folder)
        column = table.column("input_ids")
        self._starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])
        self._offsets, self._values = [], []
        for chunk in column.chunks:
            offsets, values = _list_arrays(chunk, self._folder)
            self._offsets.append(offsets)
            self._values.append(values)
        self._documents = table.column("document") if "document" in table.column_names else None

    def __getstate__(self) -> dict[str, Any]:
        """What another process need not find again; it maps the same files."""
        self.count_lengths(0, len(self))
        mapped = ("_starts", "_offsets", "_values", "_documents", "document_numbers", "inventory")
        return {name: value for name, value in self.__dict__.items() if name not in mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def documents_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the source document of each row; the rows themselves unless documents were cut."""
        return rows if self.document_numbers is None else self.document_numbers[rows]

    def row_of(self, document: int) -> int:
        """First row of a source document."""
        return document if self.document_numbers is None else int(np.searchsorted(self.document_numbers, document))

    def document_at(self, row: int) -> int:
        """Number of the source document of a row; after the last row, the number of documents."""
        numbers = self.document_numbers
        if numbers is None or not len(numbers):
            return row
        return int(numbers[row]) if row < len(numbers) else int(numbers[-1]) + 1

    @cached_property
    def document_numbers(self) -> NDArray[np.int64] | None:
        """Number of the source document that each row is a piece of, 0 and up without gaps; None where documents are
        whole."""
        if self._documents is None:
            return None
        stored = np.concatenate([chunk.to_numpy(zero_copy_only=True) for chunk in self._documents.chunks])
        # Machines that split the work number their documents without knowing of each other: only changes count.
        return np.cumsum(np.diff(stored, prepend=stored[:1]) != 0)

    def lengths(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of these documents without special tokens."""
        bounds = [self._bounds(document) for document in documents.tolist()]
        return np.array([end - start for _, start, end in bounds], dtype=np.int64)

    def content(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Tokens [start, stop) of a document without special tokens: a view of the file, in the file's integer type.

        Raises:
            DataError: one of them is no token of the tokenizer.
        """
        values, first, end = self._bounds(int(document))
        tokens = values[first:end][start:stop]
        index = self._first_outside(tokens)
        if index is not None:
            raise self._refuse(int(tokens[index]), int(document))
        return tokens

    def count_lengths(self, first: int, last: int) -> NDArray[np.int64]:
        """At index n, how many of the documents [first, last) have n tokens without special ones.

        From the offsets alone, a chunk at a time: where special tokens were found on disk, each document is assumed to
        have two of them. All of a store are counted once.
        """
        if (first, last) == (0, len(self)):
            if self._all_counts is None:
                self._all_counts = self._count_lengths(first, last)
            return self._all_counts
        if 2 * (last - first) < len(self):
            return self._count_lengths(first, last)
        counts = self.count_lengths(0, len(self)).copy()  # A few were set apart at an end.
        for outside in ((0, first), (last, len(self))):
            found = self._count_lengths(*outside)
            counts[: len(found)] -= found
        return counts

    def _count_lengths(self, first: int, last: int) -> NDArray[np.int64]:
        counts = np.zeros(1, dtype=np.int64)
        for start, offsets in zip(self._starts.tolist(), self._offsets):
            lengths = np.diff(offsets[max(0, first - start) : max(0, last - start + 1)])
            found = np.bincount(np.maximum(0, lengths.astype(np.int64) - (2 if self._stripped else 0)))
            if len(found) > len(counts):
                counts = np.pad(counts, (0, len(found) - len(counts)))
            counts[: len(found)] += found
        return counts

    def _first_outside(self, tokens: NDArray[Any]) -> int | None:
        """The index of the first number that is no token; two passes over the numbers, without a copy."""
        if not len(tokens) or (tokens.min() >= 0 and tokens.max() < self._num_ids):
            return None
        return int(np.flatnonzero((tokens < 0) | (tokens >= self._num_ids))[0])

    def _refuse(self, token: int, row: int) -> DataError:
        found = f"dataset.path: {self._folder} holds token {token} at document {self.document_at(row)}, but "
        if token < 0:
            return DataError(
                f"{found}tokens start at 0: labels or marks of padding are in input_ids; write it again without them"
            )
        return DataError(
            f"{found}the tokenizer has only {self._num_ids}: another one made it; name that one with tokenizer.name or "
            "tokenizer.path, or tokenise again"
        )

    def token_blocks(self, max_tokens: int) -> Iterator[NDArray[Any]]:
        """Runs of raw tokens, spread evenly over the store, together at most about `max_tokens`.

        Raises:
            DataError: one of them is no token of the tokenizer.
        """
        total = int(sum(int(offsets[-1]) - int(offsets[0]) for offsets in self._offsets))
        fraction = min(1.0, max_tokens / max(1, total))
        for first_row, offsets, values in zip(self._starts, self._offsets, self._values):
            begin, end = int(offsets[0]), int(offsets[-1])
            block = values[begin : min(end, begin + max(1, int((end - begin) * fraction)))]
            index = self._first_outside(block)
            if index is not None:
                row = int(np.searchsorted(offsets, begin + index, side="right")) - 1
                raise self._refuse(int(block[index]), int(first_row) + row)
            yield block

    def _bounds(self, document: int) -> tuple[NDArray[Any], int, int]:
        chunk = int(np.searchsorted(self._starts, document, side="right")) - 1
        offsets, values = self._offsets[chunk], self._values[chunk]
        index = document - int(self._starts[chunk])
        start, end = int(offsets[index]), int(offsets[index + 1])
        if self._stripped and start < end:
            start += int(values[start] == self._cls_id)
            end -= int(start < end and values[end - 1] == self._sep_id)
        return values, start, end

    def _check_sample(self, tokenizer: Tokenizer) -> bool:
        """Looks at documents spread over the store; whether special tokens are around them."""
        sample = [content for d in spread(len(self), _SAMPLE) if len(content := self.content(d))]
        padding = {tokenizer.pad_id} - {tokenizer.cls_id, tokenizer.sep_id, tokenizer.unk_id}
        if any(int(tokens[-1]) in padding for tokens in sample):
            raise DataError(
                f"dataset.path: {self._folder} holds padded documents; tokenise again without padding, "
                "which is added here where it is needed"
            )
        return any(tokens[0] == self._cls_id or tokens[-1] == self._sep_id for tokens in sample)

    def _make_fingerprint(self) -> Fingerprint:
        numbers = [] if self.document_numbers is None else [self.document_numbers]
        lengths = chain((np.diff(offsets) for offsets in self._offsets), numbers)
        return Fingerprint(digest_documents(lengths, len(self), self._raw), self._first_fingerprint())

    def _raw(self, document: int) -> bytes:
        """Tokens as they are on disk."""
        chunk = int(np.searchsorted(self._starts, document, side="right")) - 1
        offsets, index = self._offsets[chunk], document - int(self._starts[chunk])
        return self._values[chunk][int(offsets[index]) : int(offsets[index + 1])].astype(np.int32).tobytes()

    def _first_fingerprint(self) -> str:
        """As versions before this form made it: heads of 64 documents, and lengths of files."""
        digest = hashlib.sha256(f"{len(self)}\0".encode())
        digest.update(np.array([len(values) for values in self._values], dtype=np.int64).tobytes())
        for document in spread(len(self), 64):
            digest.update(self.content(document)[:4096].astype(np.int32).tobytes())
        return f"sha256:{digest.hexdigest()}"

    def count(self, span: Span = WHOLE) -> int:
        first, last = self._rows(span)
        return self.document_at(last) - self.document_at(first)

    def size(self, span: Span, order: RowOrder) -> tuple[int, int]:
        first, last = self._rows(span)
        limits = (order.max_seq_length, order.min_length)
        counts = self.count_lengths(first, last)
        lengths = np.flatnonzero(counts)
        documents, _, sizes, _ = piece_lengths(lengths, *limits, truncate=order.truncate)
        times = counts[lengths][documents]
        num_pieces = int(times.sum())
        return int((sizes * times).sum()) + SPECIALS_PER_SEGMENT * num_pieces, num_pieces

    def longest(self, span: Span) -> int:
        first, last = self._rows(span)
        # Some may lack the special tokens that were found around others.
        longest = np.flatnonzero(self.count_lengths(first, last)).max(initial=0)
        return int(longest) + (2 if self._stripped else 0)

    def slice(self, first: int, last: int | None, *, size: int | None = None, is_cap: bool = False) -> Span:
        return Span(self._cursor(first) if first else None, None if last is None else self._cursor(last))

    def first(
        self,
        span: Span,
        order: RowOrder,
        encode: Encode,
        counts: RecordCounts,
        num_documents: int | None,
        num_slots: int | None,
    ) -> FirstDocuments:
        # Their tokens stay on disk.
        first, last = self._rows(span)
        rows, lengths = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        ranks, slots_done = rows, 0
        for begin in range(first, last, _SCAN):
            found = np.arange(begin, min(last, begin + _SCAN))
            sizes = self.lengths(found)
            slots = count_slots(sizes, order)
            usable = np.flatnonzero(slots)
            if num_slots is not None:
                usable = usable[slots_done + np.cumsum(slots[usable]) - slots[usable] < num_slots]
            # Where long documents are stored in pieces, all pieces of a document count as one.
            rows, lengths = np.append(rows, found[usable]), np.append(lengths, sizes[usable])
            ranks = np.unique(self.documents_of(rows), return_inverse=True)[1]
            if num_documents is not None:
                kept = ranks < num_documents
                rows, lengths, is_full = rows[kept], lengths[kept], bool(len(ranks) and ranks[-1] >= num_documents)
                ranks = ranks[kept]
            else:
                is_full = False
            slots_done = int(count_slots(lengths, order).sum())
            if is_full or (num_slots is not None and slots_done >= num_slots):
                break
        cursor = self._cursor(int(self.documents_of(rows[-1:])[0]) + 1) if len(rows) else None
        return FirstDocuments(lengths, lambda number: self.content(int(rows[number])), ranks, cursor)

    def open(
        self, span: Span, encode: Encode, counts: RecordCounts, max_document_chars: int, num_ahead: int = 0
    ) -> Generator[EncodedDocument, None, None]:
        row, last = self._rows(span)
        for end in self._ends(row, last):
            pieces = [self.content(number) for number in range(row, end)]
            tokens = np.concatenate(pieces).astype(np.int32, copy=False)
            yield EncodedDocument(row, tokens, {"row": end}, counts.bad, counts.skipped)
            row = end

    def choose_num_lanes(self, span: Span, order: RowOrder, most: int = STREAM_LANES) -> int:
        first, last = self._rows(span)
        return choose_indexed_lanes(last - first, order.window_documents)

    def streams(self, span: Span, sharding: Sharding, settings: StreamSettings) -> Callable[[int], DocumentStream]:
        first, last = self._rows(span)
        num_tokens = self.size(span, settings.order)[0] if settings.is_mixed else 0
        return lambda lane: IndexedStream(
            store=self,
            order=settings.order,
            lane=lane,
            num_lanes=sharding.num_lanes or self.choose_num_lanes(span, settings.order),
            first=first,
            last=last,
            num_tokens=num_tokens,
            source=settings.source,
            seed=sharding.seed,
        )

    def _rows(self, span: Span) -> tuple[int, int]:
        return span.numbers("row", len(self))

    def _cursor(self, number: int) -> State:
        """After so many documents."""
        return {"row": self.row_of(number)}

    def _ends(self, row: int, last: int) -> Iterator[int]:
        """For each document from `row` on: the row after its last one."""
        numbers = self.document_numbers
        if numbers is None:
            yield from range(row + 1, last + 1)
            return
        for begin in range(row, last, _SCAN):
            block = numbers[begin : min(last, begin + _SCAN) + 1]
            yield from (np.flatnonzero(block[1:] != block[:-1]) + begin + 1).tolist()
        if row < last and last == len(numbers):
            yield last


def _list_arrays(chunk: pa.Array, folder: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Offsets and flat values of a chunk of lists, without a copy."""
    if pa.types.is_fixed_size_list(chunk.type):
        width = chunk.type.list_size
        offsets = (np.arange(len(chunk) + 1) + chunk.offset) * width
    elif pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
        offsets = chunk.offsets.to_numpy(zero_copy_only=True)
    else:
        raise DataError(f"dataset.path: column input_ids of {folder} is {chunk.type}; lists of integers are needed")
    if chunk.null_count or chunk.values.null_count or not pa.types.is_integer(chunk.values.type):
        raise DataError(f"dataset.path: column input_ids of {folder} must hold lists of integers without nulls")
    return offsets, chunk.values.to_numpy(zero_copy_only=True)
