"""A source of text tokenised from end to end, in its own order."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from neobert.data.lanes import IntArray, State
from neobert.data.text import WINDOW_CHARS, Encode, Record, RecordCounts, cut_text

ENCODE_DOCUMENTS = 256
"""Documents tokenised in one call."""


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
