"""Lanes: the independent, endless row sources that rows are drawn from in turn.

Row g of a run comes from lane g modulo the number of lanes. A lane reads its part of the documents window by window;
packing and shuffling happen inside a window only, and `open` is pure, so the state that opens a window is all that must
be stored to have it again. A state is a small JSON object; `row` counts the rows of its window already used.

A window is planned in three steps, for L slots in a row:

    stream    the next documents of the lane, in tokens
    split     pieces of at most L - 2 tokens
    plan      pieces packed into rows; the rows in an order keyed by (seed, lane, epoch, window)

An automatic number of lanes never ends a run: there are as many lanes as find documents. A source is cut by what it
says of its size, and not all of it need be documents: one line may be larger than many ranges, files sorted by length
start with empty texts, a row group holds nulls. Every lane is asked for its first document; while some have none, the
source is cut again for as many lanes as had one. That is a function of the data and the settings alone, so every
process and every resume finds the same number, and the data state holds it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from neobert.data.rows.order import Permutation, key
from neobert.data.rows.packing import (
    SPECIALS_PER_SEGMENT,
    Piece,
    best_fit,
    max_segments_per_row,
    one_per_row,
    split_documents,
)
from neobert.errors import DataError

IntArray = NDArray[np.int32]
State = dict[str, Any]

MAX_EMPTY_WINDOWS = 1000
"""Windows in a row without a single row: then nothing will come."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DocumentBatch:
    """The next documents of a stream."""

    lengths: NDArray[np.int64]
    """Tokens of each, special tokens not counted."""

    get: Callable[[int, int, int], NDArray[Any]]
    """`get(item, start, length)`: that stretch of a document."""

    documents: NDArray[np.int64]
    """Number of each document in its source."""

    sources: NDArray[np.int64]
    """Number of each document's source."""

    starts: NDArray[np.int64]
    """Token at which each starts here: above 0 where a large document continues that an earlier batch started."""

    next_state: State
    ended: bool
    """Whether the epoch is over; `next_state` then starts the next one."""


class DocumentStream(Protocol):
    """The documents of one lane, epoch after epoch."""

    @property
    def size(self) -> int:
        """Amount of text, about, in bytes; 0 when unknown."""

    def start(self) -> State:
        """The state before the first document."""

    def take(self, state: State, max_documents: int) -> DocumentBatch:
        """At most so many documents after `state`, none of the next epoch. Pure. Fewer when they are large."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Window:
    """A planned stretch of a lane."""

    rows: list[list[Piece]]
    get: Callable[[Piece], NDArray[Any]]
    """The tokens of a piece, integers without special tokens."""

    documents: NDArray[np.int64]
    """Number in its source of each document of the window."""

    sources: NDArray[np.int64]
    """Number of each document's source."""

    next_state: State


class Lane(Protocol):
    """An endless source of rows."""

    def start(self) -> State:
        """The state before the first row."""

    def open(self, state: State) -> Window:
        """The window that `state` is in. Pure: the same state gives the same rows forever."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowOrder:
    """What decides, beside the documents, how they become rows and in which order: a data state is valid only under
    the same values, and holds them."""

    seed: int
    num_lanes: int = 0
    """0 while it is being chosen."""

    window_documents: int
    max_seq_length: int
    min_length: int
    truncate: bool
    shuffle: bool = True
    """False keeps the order of the source: rows are ordered by their first document."""

    max_document_chars: int = 1_000_000
    packing: Literal["best_fit", "next_fit", "none"]
    """best_fit: full rows planned over a window. next_fit: each micro-batch packs its documents without looking ahead.
    none: one document per row."""

    @classmethod
    def of_examples(cls, *, seed: int, window_documents: int, max_seq_length: int) -> Self:
        """Of examples that are rows of their own, in one shuffled lane."""
        return cls(
            seed=seed,
            num_lanes=1,
            window_documents=window_documents,
            max_seq_length=max_seq_length,
            min_length=0,
            truncate=True,
            max_document_chars=0,
            packing="none",
        )

    def plan(self, pieces: list[Piece], order_key: int) -> list[list[Piece]]:
        """The pieces of a window as rows, in an order that the key decides; next_fit packs them later."""
        lengths = [piece.length + SPECIALS_PER_SEGMENT for piece in pieces]
        if self.packing == "best_fit":
            limit = max_segments_per_row(self.max_seq_length, packed=True)
            rows = best_fit(lengths, self.max_seq_length, limit)
        else:
            rows = one_per_row(lengths)
        if not self.shuffle:
            return [[pieces[item] for item in items] for items in sorted(sorted(row) for row in rows)]
        order = Permutation(len(rows), order_key)(np.arange(len(rows)))
        return [[pieces[item] for item in rows[number]] for number in order.tolist()]


class PackingLane:
    """Rows from the documents of a stream."""

    def __init__(self, stream: DocumentStream, order: RowOrder, lane: int) -> None:
        self._stream, self._order, self._lane = stream, order, lane

    def start(self) -> State:
        counters = {"used": 0, "empty": 0, "dropped": 0}
        return {"epoch": 0, "window": 0, "row": 0, **counters, "stream": self._stream.start()}

    def open(self, state: State) -> Window:
        order, epoch = self._order, state["epoch"]
        batch = self._stream.take(state["stream"], order.window_documents)
        pieces, num_dropped = split_documents(
            batch.lengths, order.max_seq_length, order.min_length, truncate=order.truncate
        )
        starts = batch.starts.tolist()
        pieces = [piece._replace(start=piece.start + starts[piece.document]) for piece in pieces]
        next_state = {
            "epoch": epoch,
            "window": state["window"] + 1,
            "row": 0,
            "used": state["used"] + len(pieces),
            "empty": 0 if pieces else state["empty"] + 1,
            "dropped": state["dropped"] + num_dropped,
            "stream": batch.next_state,
        }
        if next_state["empty"] > MAX_EMPTY_WINDOWS or (batch.ended and not epoch and not next_state["used"]):
            raise self._no_rows()
        if batch.ended:
            # Where every epoch deals few documents out again, a lane may have none in one and some in the next.
            next_state |= {"epoch": epoch + 1, "window": 0, "used": 0}
        return Window(
            rows=order.plan(pieces, key(order.seed, "rows", self._lane, epoch, state["window"])),
            get=lambda piece: batch.get(piece.document, piece.start, piece.length),
            documents=batch.documents,
            sources=batch.sources,
            next_state=next_state,
        )

    def _no_rows(self) -> DataError:
        """The error of a lane that holds nothing to train on, and would be read forever."""
        return DataError(
            f"lane {self._lane} has no usable documents: all of them are empty, unreadable or shorter than "
            "dataset.min_length; lower dataset.num_lanes or leave it null, lower dataset.min_length, or check "
            "dataset.text_column"
        )


_THREADS = 8

OpenStreams = Callable[[int], Sequence[DocumentStream]]
"""Lane -> its stream of each source."""


def sum_counters(state: State) -> dict[str, int]:
    """Records skipped so far, summed over the lanes: `bad`, `skipped` (no text), `dropped` (shorter than
    `dataset.min_length`). A lane counts a window when it continues to the next one."""
    totals = dict.fromkeys(("bad", "skipped", "dropped"), 0)

    def add(part: State) -> None:
        for name in totals:
            totals[name] += part.get(name, 0)
        for below in [part["stream"]] if "stream" in part else part.get("sources", []):
            add(below)

    for lane in state.get("lanes", {}).values():
        add(lane)
    return totals


def fit_num_lanes(most: int, cut: Callable[[int], OpenStreams], order: RowOrder, *, weighted: bool) -> int:
    """The number of lanes, at most `most`, of which each finds a document in its first epoch; 1 when nothing does.

    Args:
        cut: the streams of a number of lanes.
        weighted: whether documents are drawn by the weights of the sources, which needs one of every source.
    """
    num_lanes = most
    while num_lanes > 1:
        open_streams = cut(num_lanes)
        with ThreadPoolExecutor(_THREADS) as threads:
            lanes = [threads.submit(_is_filled, open_streams(lane), order, weighted) for lane in range(num_lanes)]
            num_filled = sum(lane.result() for lane in lanes)
        if num_filled == num_lanes:
            break
        num_lanes = max(1, num_filled)
    return num_lanes


def _is_filled(streams: Sequence[DocumentStream], order: RowOrder, weighted: bool) -> bool:
    def has_pieces(lengths: NDArray[np.int64]) -> bool:
        limits = (order.max_seq_length, order.min_length)
        return bool(split_documents(lengths, *limits, truncate=order.truncate)[0])

    if weighted and not all(_finds(stream, len, order) for stream in streams):
        return False
    return any(_finds(stream, has_pieces, order) for stream in streams)


def _finds(stream: DocumentStream, is_enough: Callable[[NDArray[np.int64]], int], order: RowOrder) -> bool:
    """Whether the first epoch has documents with these lengths; few are read where the first ones do."""
    state, count = stream.start(), 1
    while True:
        batch = stream.take(state, count)
        if is_enough(batch.lengths):
            return True
        if batch.ended:
            return False
        state, count = batch.next_state, min(2 * count, order.window_documents)
