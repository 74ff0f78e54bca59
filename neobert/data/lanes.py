"""Lanes: the independent, endless row sources that rows are drawn from in turn.

Row g of a run comes from lane g modulo the number of lanes. A lane reads its share of the documents window by window:
a window is shuffled and packed by itself, and `open` is pure, so the state that opens a window is all that must be
stored to have it again. A state is a small JSON object; `row` counts the rows of its window already used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from neobert.data.errors import DataError
from neobert.data.order import Permutation, key
from neobert.data.packing import (
    SPECIALS_PER_SEGMENT,
    Piece,
    best_fit,
    max_segments_per_row,
    one_per_row,
    split_documents,
)

IntArray = NDArray[np.int32]
State = dict[str, Any]

WINDOW_TOKENS = 1 << 20
"""A window of indexed documents ends after this many tokens even when it has few documents."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Window:
    """A planned stretch of a lane."""

    rows: list[list[Piece]]
    get: Callable[[Piece], NDArray[Any]]
    """The tokens of a piece, integers without special tokens."""

    documents: NDArray[np.int64]
    """Number in the source of each document of the window."""

    next_state: State


class Lane(Protocol):
    """An endless source of rows."""

    def start(self) -> State:
        """The state before the first row."""

    def open(self, state: State) -> Window:
        """The window that `state` stands in. Pure: the same state gives the same rows for ever."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneSettings:
    """What decides how documents become rows, besides the documents."""

    seed: int
    max_seq_length: int
    window_documents: int
    min_length: int
    truncate: bool
    packing: Literal["best_fit", "one_per_row"]
    max_document_chars: int = 1_000_000
    max_bad_records: int = 100

    def plan(self, pieces: list[Piece], order_key: int) -> list[list[Piece]]:
        """The pieces as rows, in an order that the key decides."""
        lengths = [piece.length + SPECIALS_PER_SEGMENT for piece in pieces]
        if self.packing == "best_fit":
            limit = max_segments_per_row(self.max_seq_length, packed=True)
            rows = best_fit(lengths, self.max_seq_length, limit)
        else:
            rows = one_per_row(lengths)
        order = Permutation(len(rows), order_key)(np.arange(len(rows)))
        return [[pieces[item] for item in rows[number]] for number in order.tolist()]


class IndexedTokens(Protocol):
    """Tokenised documents with random access."""

    def __len__(self) -> int: ...

    def lengths(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of these documents, special tokens not counted."""

    def content(self, document: int) -> NDArray[Any]:
        """Tokens of a document without special tokens."""


class IndexedLane:
    """Documents `first` to the end of an indexed store, in one permutation of the whole store per epoch.

    Lane v of V owns the permuted places v, v + V, v + 2V, ... The state's `position` counts these places, and `offset`
    is the token at which the document there goes on: a document that would make a window too large is continued in
    the next one, so nothing is lost.
    """

    def __init__(self, store: IndexedTokens, settings: LaneSettings, lane: int, num_lanes: int, first: int = 0) -> None:
        self._store, self._settings, self._lane, self._num_lanes, self._first = store, settings, lane, num_lanes, first
        self._size = len(store) - first
        self._num_places = (self._size - lane + num_lanes - 1) // num_lanes

    def start(self) -> State:
        return {"epoch": 0, "window": 0, "row": 0, "position": 0, "offset": 0, "used": 0, "dropped": 0}

    def open(self, state: State) -> Window:
        settings, epoch, position, done = self._settings, state["epoch"], state["position"], state["offset"]
        end = min(self._num_places, position + settings.window_documents)
        places = np.arange(position, end) * self._num_lanes + self._lane
        documents = Permutation(self._size, key(settings.seed, "documents", epoch))(places) + self._first
        lengths = self._store.lengths(documents)
        lengths[:1] -= done
        lengths, rest = _limit_tokens(lengths, settings.max_seq_length - SPECIALS_PER_SEGMENT, settings.truncate)
        pieces, num_dropped = split_documents(
            lengths, settings.max_seq_length, settings.min_length, truncate=settings.truncate
        )
        if done:
            pieces = [p._replace(start=p.start + done) if p.document == 0 else p for p in pieces]
        next_state = {
            "epoch": epoch,
            "window": state["window"] + 1,
            "row": 0,
            "position": position + len(lengths) - (rest > 0),
            "offset": rest + (done if len(lengths) == 1 else 0) if rest else 0,
            "used": state["used"] + len(pieces),
            "dropped": state["dropped"] + num_dropped,
        }
        if next_state["position"] == self._num_places:
            check_lane_gave_rows(self._lane, next_state["used"])
            next_state |= {"epoch": epoch + 1, "window": 0, "position": 0, "used": 0}
        return Window(
            rows=settings.plan(pieces, key(settings.seed, "rows", self._lane, epoch, state["window"])),
            get=lambda piece: self._store.content(documents[piece.document])[piece.start : piece.start + piece.length],
            documents=documents,
            next_state=next_state,
        )


def _limit_tokens(lengths: NDArray[np.int64], content: int, truncate: bool) -> tuple[NDArray[np.int64], int]:
    """The first documents that together have `WINDOW_TOKENS` tokens.

    The last of them is cut after a whole number of pieces; the second value is how many of its tokens were taken, or
    0 when it was not cut.
    """
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


def check_lane_gave_rows(lane: int, num_used: int) -> None:
    """Raises when a whole epoch of a lane holds nothing to train on: without this it would be read for ever.

    Raises:
        DataError: the lane has no usable documents.
    """
    if not num_used:
        raise DataError(
            f"lane {lane} has no usable documents: all of them are empty, unreadable or shorter than "
            "dataset.min_length; lower dataset.num_lanes or dataset.min_length, or check dataset.text_column"
        )
