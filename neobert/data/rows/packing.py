"""Which documents share a row.

Documents are first split into pieces that fit a row: with L slots, at most L - 2 tokens each, because a piece becomes
the segment `[CLS] tokens [SEP]`. Then segments are put into rows. Worked example, L = 10 and `min_length` 2, documents
of 3, 17 and 4 tokens:

    split      (0, 0, 3)  (1, 0, 8)  (1, 8, 8)  (1, 16, 1)  (2, 0, 4)      (document, start, length)
               the tail (1, 16, 1) is shorter than min_length: dropped and counted
    segments   5          10         10                     6              slots
    best fit   [10]  [10]  [6]  [5]                         5 does not fit beside 6 in 10 slots

Best-fit decreasing takes the longest segment first and puts it into the fullest row that still holds it. Over a
window of a thousand documents it leaves under 1% of the slots empty; next-fit, which never looks back, leaves 25%.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SPECIALS_PER_SEGMENT = 2
"""[CLS] and [SEP]."""


class Piece(NamedTuple):
    """A stretch of a document that becomes one segment."""

    document: int
    """Number of the document within its window."""

    start: int
    """First token, counted within the document without special tokens."""

    length: int
    """Number of tokens, without special tokens."""


def max_segments_per_row(max_seq_length: int, *, packed: bool) -> int:
    """Upper bound of the segments in a row, which makes the number of segment borders constant."""
    return max(1, max_seq_length // 8) if packed else 1


def piece_lengths(
    lengths: NDArray[np.int64], max_seq_length: int, min_length: int, *, truncate: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int]:
    """Splits documents; returns (document, start, length) of the pieces in document order, and how many were dropped.

    Pieces of fewer than `min_length` tokens are dropped and counted; empty documents are skipped.
    With `truncate` only the first piece of a document is kept, and its rest is not counted.
    """
    content = max_seq_length - SPECIALS_PER_SEGMENT
    counts = -(-lengths // content)
    if truncate:
        counts = np.minimum(counts, 1)
    documents = np.repeat(np.arange(len(lengths)), counts)
    first_piece = np.cumsum(counts) - counts
    starts = (np.arange(len(documents)) - first_piece[documents]) * content
    sizes = np.minimum(content, lengths[documents] - starts)
    kept = sizes >= max(1, min_length)
    return documents[kept], starts[kept], sizes[kept], int(len(kept) - kept.sum())


def split_documents(
    lengths: NDArray[np.int64], max_seq_length: int, min_length: int, *, truncate: bool = False
) -> tuple[list[Piece], int]:
    """`piece_lengths` as a list of pieces, and the number of dropped ones."""
    documents, starts, sizes, num_dropped = piece_lengths(lengths, max_seq_length, min_length, truncate=truncate)
    return [Piece(*p) for p in zip(documents.tolist(), starts.tolist(), sizes.tolist())], num_dropped


def best_fit(lengths: Sequence[int], capacity: int, max_items: int) -> list[list[int]]:
    """Rows of item numbers by best-fit decreasing; equal items keep their order, so the plan is deterministic.

    No row exceeds `capacity` slots or `max_items` items. O(n log n + n * capacity / 64): rows wait in stacks by the
    number of free slots, and the set bits of one integer say which stacks are not empty.

    >>> best_fit([5, 10, 10, 6, 4], capacity=10, max_items=4)
    [[1], [2], [3, 4], [0]]
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0
    for item in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = lengths[item]
        fitting = occupied >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            stack = open_rows[free]
            number = stack.pop()
            if not stack:
                occupied ^= 1 << free
        else:
            free, number = capacity, len(rows)
            rows.append([])
        row = rows[number]
        row.append(item)
        free -= length
        if free and len(row) < max_items:
            open_rows[free].append(number)
            occupied |= 1 << free
    return rows


def one_per_row(lengths: Sequence[int]) -> list[list[int]]:
    """Every item in its own row."""
    return [[item] for item in range(len(lengths))]


def next_fit(lengths: Sequence[int], capacity: int, max_items: int) -> list[list[int]]:
    """Items in the order given: each joins the last row or, when it does not fit there, starts a new one.

    >>> next_fit([5, 4, 10, 3], capacity=10, max_items=4)
    [[0, 1], [2], [3]]
    """
    rows: list[list[int]] = []
    free = 0
    for item, length in enumerate(lengths):
        if not rows or length > free or len(rows[-1]) == max_items:
            rows.append([])
            free = capacity
        rows[-1].append(item)
        free -= length
    return rows
