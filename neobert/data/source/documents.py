"""One interface for the documents of a split, indexed or streamed, and what all sources of text have in common.

| the documents are | `is_tokenised` | `is_indexed` | class |
|---|---|---|---|
| tokens on disk | yes | yes | `store.tokens.TokenStore` |
| texts with random access | no | yes | `store.arrow.IndexedTexts` |
| texts in shards that are read from their start | no | no | `source.sharing.ShardedSource` |

Every stretch of documents is a `Span` of their cursors; what a cursor holds is the business of the class alone.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from neobert.config.schema_data import DatasetSection
from neobert.data.rows.lanes import DocumentStream, IntArray, RowOrder, State
from neobert.data.rows.packing import SPECIALS_PER_SEGMENT, piece_lengths
from neobert.data.rows.streams import TextStream
from neobert.data.source.inventory import NO_FILES, Inventory
from neobert.data.source.text import (
    STREAM_LANES,
    WHOLE,
    WINDOW_CHARS,
    Encode,
    LaneReader,
    Record,
    RecordCounts,
    Records,
    Sharding,
    Span,
    cut_text,
)
from neobert.errors import DataError

ENCODE_DOCUMENTS = 256
"""Documents tokenised in one call."""


class EncodedDocument(NamedTuple):
    """A whole document of a source as tokens."""

    document: int
    tokens: IntArray
    cursor: State
    """Where reading continues after it."""

    bad: int = 0
    """Records before it that cannot be read, as the counts had it when the document was met."""

    skipped: int = 0
    """Records before it without text."""


class _Waiting(NamedTuple):
    """A record that is not tokenised yet, with the counts of the records before it."""

    record: Record
    bad: int
    skipped: int


def encode_documents(
    records: Iterable[Record], encode: Encode, counts: RecordCounts, max_document_chars: int, *, num_ahead: int = 0
) -> Iterator[EncodedDocument]:
    """Tokenises a source in its order, in batches of bounded size; texts over the limit are encoded in parts.

    With `num_ahead`, that many batches are tokenised in a thread while the caller works on the one before and more
    text is read. The order and the counts of a document do not depend on it.
    """
    if not num_ahead:
        for batch in _batches(records, counts):
            yield from _encode_batch(batch, encode, max_document_chars)
        return
    ahead: deque[Future[list[EncodedDocument]]] = deque()
    with ThreadPoolExecutor(max_workers=1) as pool:
        for batch in _batches(records, counts):
            ahead.append(pool.submit(_encode_batch, batch, encode, max_document_chars))
            if len(ahead) > num_ahead:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


def _batches(records: Iterable[Record], counts: RecordCounts) -> Iterator[list[_Waiting]]:
    waiting: list[_Waiting] = []
    num_chars = 0
    for record in records:
        if record.text is None:
            counts.add(record)
            continue
        waiting.append(_Waiting(record, counts.bad, counts.skipped))
        num_chars += len(record.text)
        if len(waiting) >= ENCODE_DOCUMENTS or num_chars >= WINDOW_CHARS:
            yield waiting
            waiting, num_chars = [], 0
    if waiting:
        yield waiting


def _encode_batch(batch: list[_Waiting], encode: Encode, max_document_chars: int) -> list[EncodedDocument]:
    cut = [list(cut_text(waiting.record.text or "", max_document_chars)) for waiting in batch]
    tokens = iter(encode([text for texts in cut for text in texts]))
    documents = []
    for (record, bad, skipped), texts in zip(batch, cut):
        parts = [next(tokens) for _ in texts]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        documents.append(EncodedDocument(record.document, whole, record.cursor, bad, skipped))
    return documents


class FirstDocuments(NamedTuple):
    """Usable documents in source order, numbered from 0."""

    lengths: NDArray[np.int64]
    get: Callable[[int], NDArray[Any]]
    """Tokens of the document with this number, without special tokens."""

    document_of: NDArray[np.int64]
    """Number of the whole document of each, from 0; documents that were stored in pieces repeat theirs."""

    last: State | None
    """Cursor of the last one; None without any."""

    @property
    def num_documents(self) -> int:
        """Whole documents."""
        return int(self.document_of.max(initial=-1)) + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSettings:
    """How the documents of one source become the streams of lanes."""

    order: RowOrder
    section: DatasetSection
    encode: Encode
    source: int = 0
    """Number of the source."""

    is_mixed: bool = False
    """Whether there are other sources, so that the size of each matters."""

    log: bool = True
    """Whether bad records and shards are named."""


class Documents:
    """The documents of one split in an order of their own, with a cursor after each."""

    fingerprint: str
    """Changes when the documents change."""

    notes: list[str]
    """What was found and chosen, for the console."""

    inventory: Inventory = NO_FILES
    """Their files."""

    is_tokenised = False
    is_indexed = False
    """Whether a document can be read without those before it."""

    in_place = True
    """Whether lanes read them where they are; else they are tokenised to disk first."""

    def count(self, span: Span = WHOLE) -> int | None:
        """Number of documents where it is known without reading them."""
        raise NotImplementedError

    def size(self, span: Span, order: RowOrder) -> tuple[int, int] | None:
        """(tokens with special tokens, pieces) of one pass; None for text."""
        return None

    def longest(self, span: Span) -> int | None:
        """Tokens of the longest one at most, without special tokens; None for text."""
        return None

    def slice(self, first: int, last: int | None, *, size: int | None = None, is_cap: bool = False) -> Span:
        """Documents [first, last); None: up to the end.

        Args:
            size: number of documents, where it is known.
            is_cap: there may be fewer than `last`.

        Raises:
            DataError: there are fewer, and `last` is no cap.
        """
        raise NotImplementedError

    def first(
        self,
        span: Span,
        order: RowOrder,
        encode: Encode,
        counts: RecordCounts,
        num_documents: int | None,
        num_slots: int | None,
    ) -> FirstDocuments:
        """The first usable documents: so many, or until they fill so many slots of rows, or all.

        Records that give none are added to `counts`.
        """
        raise NotImplementedError

    def open(
        self, span: Span, encode: Encode, counts: RecordCounts, max_document_chars: int, num_ahead: int = 0
    ) -> Generator[EncodedDocument, None, None]:
        """Whole documents as tokens, in order; records that give none are added to `counts`.

        Args:
            num_ahead: batches of text that are tokenised in a thread ahead of the caller.
        """
        raise NotImplementedError

    def choose_num_lanes(self, span: Span, order: RowOrder, most: int = STREAM_LANES) -> int:
        """Lanes that the documents are worth, when nobody says how many; `most` of a stream."""
        raise NotImplementedError

    def streams(self, span: Span, sharding: Sharding, settings: StreamSettings) -> Callable[[int], DocumentStream]:
        """Lane -> its documents."""
        raise NotImplementedError

    def token_blocks(self, max_tokens: int) -> Iterator[NDArray[Any]]:
        """Runs of tokens, spread evenly, together at most about `max_tokens`; none of text."""
        return iter(())

    def as_text(self, label: str) -> "TextDocuments":
        """These documents as text.

        Raises:
            DataError: they are tokens; `label` names the source.
        """
        raise DataError(f"{label} is tokenised already; name text, or train on this folder as it is")


class TextDocuments(Documents):
    """The documents of one split as text. Subclasses say what a record, a cursor and a reader are."""

    def records(self, span: Span = WHOLE) -> Records:
        """Records in source order."""
        raise NotImplementedError

    def readers(self, sharding: Sharding, span: Span = WHOLE) -> Sequence[LaneReader]:
        """One reader for each lane. Together they read every record of the span once in an epoch; their cursors are
        none of the source."""
        raise NotImplementedError

    def cursor_after(self, number: int) -> State:
        """Cursor of the record with this number in source order, counted from 1.

        Raises:
            DataError: there are fewer records.
        """
        raise NotImplementedError

    def part(self, number: int, count: int) -> Span:
        """Part `number`, from 0, of `count` parts of about equal size that follow one another.

        Raises:
            DataError: the source cannot be cut into so many.
        """
        raise NotImplementedError

    def slice(self, first: int, last: int | None, *, size: int | None = None, is_cap: bool = False) -> Span:
        after = self.cursor_after(first) if first else None
        if last is None or last == size:
            return Span(after)
        try:
            return Span(after, self.cursor_after(last))
        except DataError:
            if not is_cap:
                raise
            return Span(after)  # Fewer documents than the cap: all of them.

    def first(
        self,
        span: Span,
        order: RowOrder,
        encode: Encode,
        counts: RecordCounts,
        num_documents: int | None,
        num_slots: int | None,
    ) -> FirstDocuments:
        # Their tokens are kept in memory.
        tokens: list[NDArray[Any]] = []
        slots_done, last = 0, None
        for document in self.open(span, encode, counts, order.max_document_chars):
            slots = int(count_slots(np.array([len(document.tokens)]), order)[0])
            if not slots:
                continue
            tokens.append(document.tokens)
            slots_done, last = slots_done + slots, document.cursor
            if len(tokens) == num_documents or (num_slots is not None and slots_done >= num_slots):
                break
        lengths = np.array([len(t) for t in tokens], dtype=np.int64)
        return FirstDocuments(lengths, tokens.__getitem__, np.arange(len(tokens)), last)

    def open(
        self, span: Span, encode: Encode, counts: RecordCounts, max_document_chars: int, num_ahead: int = 0
    ) -> Generator[EncodedDocument, None, None]:
        with closing(self.records(span)) as records:
            yield from encode_documents(records, encode, counts, max_document_chars, num_ahead=num_ahead)

    def choose_num_lanes(self, span: Span, order: RowOrder, most: int = STREAM_LANES) -> int:
        return len(self.readers(Sharding(seed=0, num_lanes=None, shuffle=order.shuffle, most=most), span))

    def streams(self, span: Span, sharding: Sharding, settings: StreamSettings) -> Callable[[int], DocumentStream]:
        readers = self.readers(sharding, span)
        return lambda lane: TextStream(
            reader=readers[lane],
            encode=settings.encode,
            order=settings.order,
            lane=lane,
            source=settings.source,
            section=settings.section,
            log=settings.log,
        )

    def as_text(self, label: str) -> "TextDocuments":
        return self


def count_slots(lengths: NDArray[np.int64], order: RowOrder) -> NDArray[np.int64]:
    """Slots that each document takes: of its segments, or of whole rows where every segment has its own; 0 when it is
    not usable."""
    documents, _, sizes, _ = piece_lengths(lengths, order.max_seq_length, order.min_length, truncate=order.truncate)
    if order.packing != "best_fit":
        sizes = np.full_like(sizes, order.max_seq_length)
    else:
        sizes = sizes + SPECIALS_PER_SEGMENT
    return np.bincount(documents, weights=sizes, minlength=len(lengths)).astype(np.int64)
