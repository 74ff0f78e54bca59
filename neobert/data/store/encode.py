"""A source of text tokenised from end to end, in its own order."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from neobert.data.rows.lanes import IntArray, State
from neobert.data.source.text import WINDOW_CHARS, Encode, Record, RecordCounts, cut_text

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
