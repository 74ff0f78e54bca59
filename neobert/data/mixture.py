"""Several sources as one stream of documents.

Every document slot of a lane draws its source from a hash of (seed, lane, epoch, slot), and the lane keeps one state
for each source: that is all there is to remember. Two ways of mixing:

    weights given    slots fall to the sources in these shares; a source that ends begins its next epoch at once
    no weights       each document once per epoch; slots fall to the sources in the shares of their sizes, so that they
                     run out at about the same time; what is left of a longer one follows alone

Worked example, weights 3 and 1, five slots: hashes .12 .80 .55 .91 .07 of [0, 1) fall to sources 0 1 0 1 0, so the
window holds the next three documents of source 0 and the next two of source 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neobert.data.errors import DataError
from neobert.data.lanes import DocumentStream, State, Taken
from neobert.data.order import extend_keys, key, uniforms

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

    def take(self, state: State, max_documents: int) -> Taken:
        chosen = self._choose(state, max_documents)
        taken: list[Taken] = []
        places: list[NDArray[np.int64]] = []
        owed, ended, states = list(state["owed"]), set(state["ended"]), list(state["sources"])
        for number in range(len(self.streams)):
            slots = np.flatnonzero(chosen == number)
            parts, states[number], owed[number] = self._take_from(number, states[number], owed[number] + len(slots))
            if self.weights is None and parts and parts[-1].ended:
                ended.add(number)
                owed[number] = 0
            taken += parts
            count = sum(len(part.lengths) for part in parts)
            # Documents stand at their slots; those that an earlier window still owed come behind them.
            places.append(np.concatenate([slots, max_documents + np.arange(count)])[:count])
        slot = state["slot"] + max_documents
        is_over = len(ended) == len(self.streams)
        next_state = {**state, "slot": slot, "owed": owed, "ended": sorted(ended), "sources": states}
        return _join(
            taken,
            np.argsort(np.concatenate(places), kind="stable"),
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

    def _take_from(self, number: int, state: State, count: int) -> tuple[list[Taken], State, int]:
        """The next `count` documents of a source; (takes, state after them, documents still owed)."""
        parts: list[Taken] = []
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


def _join(parts: Sequence[Taken], order: NDArray[np.int64], *, next_state: State, ended: bool) -> Taken:
    """Takes side by side, their documents in the given order."""
    numbers = [np.full(len(part.lengths), number) for number, part in enumerate(parts)]
    items = [np.arange(len(part.lengths)) for part in parts]

    def joined(arrays: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        return np.concatenate([np.empty(0, dtype=np.int64), *arrays])[order].astype(np.int64)

    part_of, item_of = joined(numbers), joined(items)
    return Taken(
        lengths=joined([part.lengths for part in parts]),
        get=lambda item, start, length: parts[part_of[item]].get(int(item_of[item]), start, length),
        documents=joined([part.documents for part in parts]),
        sources=joined([part.sources for part in parts]),
        starts=joined([part.starts for part in parts]),
        next_state=next_state,
        ended=ended,
    )
