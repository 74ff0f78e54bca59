"""Texts, pairs and lists of words as tokens, in training and for a user alike.

A row becomes the tokens between [CLS] and [SEP]; the two texts of a pair have a [SEP] between them, or
what the tokenizer's own template has there. Words are joined
by spaces, as a reader writes them, and the label of a word belongs to its first token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_NO_WORDS = np.empty(0, dtype=np.int64)


class EncodedRows(NamedTuple):
    """Rows as tokens, cut at a length."""

    tokens: list[NDArray[np.int32]]
    """Of each row, without the [CLS] before and the [SEP] after it."""

    firsts: list[NDArray[np.int64]]
    """Of each row the index among its tokens of the first one of every word; -1 for a word that was cut off, or that
    the tokenizer makes nothing of. Empty for texts."""

    longest: int
    """Tokens of the longest row before it was cut, special tokens included."""

    num_cut: int
    """Rows that were cut."""


def encode_rows(tokenizer: Any, rows: Sequence[Sequence[str]], max_length: int) -> EncodedRows:
    """Texts (rows of one) and pairs, cut to `max_length` tokens, special tokens included: the longer text of a pair
    loses tokens first."""
    found = tokenizer.encode_batch([text for row in rows for text in row])
    tokens, longest, num_cut, start = [], 0, 0, 0
    between = [tokenizer.sep_id] * tokenizer.pair_separators
    for row in rows:
        parts, start = found[start : start + len(row)], start + len(row)
        specials = 2 + len(between) * (len(row) - 1)
        lengths = [len(part) for part in parts]
        longest = max(longest, sum(lengths) + specials)
        kept = _cut(lengths, max_length - specials)
        num_cut += sum(kept) < sum(lengths)
        joined = [x for part, length in zip(parts, kept) for x in (between, part[:length])][1:]
        tokens.append(np.concatenate(joined).astype(np.int32))
    return EncodedRows(tokens, [_NO_WORDS] * len(rows), longest, num_cut)


def _cut(lengths: Sequence[int], room: int) -> list[int]:
    """Tokens kept of one or two texts that have `room` tokens together.

    >>> _cut([9, 3], 8), _cut([9, 9], 7), _cut([2, 3], 8)
    ([5, 3], [4, 3], [2, 3])
    """
    if sum(lengths) <= room:
        return list(lengths)
    if len(lengths) == 1:
        return [room]
    shorter = min(min(lengths), room // 2)
    rest = room - shorter
    return [rest, shorter] if lengths[0] >= lengths[1] else [shorter, rest]


def encode_words(tokenizer: Any, rows: Sequence[Sequence[str]], max_length: int) -> EncodedRows:
    """Lists of words, cut to `max_length` tokens, special tokens included."""
    encoded = tokenizer.encode_with_offsets([" ".join(words) for words in rows])
    tokens, firsts, room = [], [], max_length - 2
    for words, (ids, offsets) in zip(rows, encoded):
        tokens.append(ids[:room])
        firsts.append(_find_firsts(words, offsets[:room]))
    lengths = [len(ids) for ids, _ in encoded]
    return EncodedRows(tokens, firsts, max(lengths, default=0) + 2, sum(length > room for length in lengths))


def _find_firsts(words: Sequence[str], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first token that has a character of each word, among tokens that cover `offsets` of the joined words."""
    sizes = np.array([len(word) for word in words], dtype=np.int64)
    starts = np.cumsum(sizes + 1) - sizes - 1
    if not len(offsets):
        return np.full(len(words), -1)
    # Ends ascend: the first token that ends after a word starts.
    found = np.searchsorted(np.maximum.accumulate(offsets[:, 1]), starts, side="right")
    inside = found < len(offsets)
    inside[inside] = offsets[found[inside], 0] < (starts + sizes)[inside]
    return np.where(inside, found, -1)
