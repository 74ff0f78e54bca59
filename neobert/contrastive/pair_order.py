"""Which pairs a step takes: one set a step, its pairs in an order that depends on numbers alone.

All rows of a step come from one lane, a window at a time, and a window is a step:

    set        of window n: drawn from (seed, n); set s with a chance in proportion to (its pairs) ** alpha
    pairs      the next ones of that set, in an order keyed by (seed, s, epoch); a set starts again when it ends
    negatives  where an anchor has more than are used: drawn from (seed, s, epoch, pair)

The state is the number of the window and how many pairs of each set were used, so a continued run has the same steps.
Every process plans all rows and reads the texts of its own only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neobert.contrastive.set_folder import PairStore
from neobert.data.rows.lanes import IntArray, State, Window
from neobert.data.rows.order import Permutation, key, uniform
from neobert.data.rows.packing import SPECIALS_PER_SEGMENT, Piece
from neobert.objectives.pair_batch import Kind


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainSet:
    """A set as it is trained on."""

    key: str
    store: PairStore
    kind: Kind
    """The loss of its steps."""

    first: int
    """Examples before this one are held out."""

    anchor_prefix: str
    positive_prefix: str
    num_negatives: int
    """Of an anchor; those that have fewer bring what they have."""

    def __len__(self) -> int:
        return len(self.store) - self.first

    def texts(self, number: int, drawn_by: int) -> list[str]:
        """The texts of example `number`, in the order in which a row holds them."""
        example = self.store.get(number)
        anchor = self.anchor_prefix + example["anchor"]
        if self.kind == "simcse":
            return [anchor, anchor]
        if self.kind in ("supcon", "mlm"):
            return [anchor]
        if self.kind == "distill" and not example.get("positive"):
            return [anchor]
        negatives = example["negatives"] if self.num_negatives else []
        if len(negatives) > self.num_negatives:
            chosen = Permutation(len(negatives), drawn_by)(np.arange(self.num_negatives))
            negatives = [negatives[index] for index in chosen.tolist()]
        return [anchor, *(self.positive_prefix + text for text in (example["positive"], *negatives))]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairOrder:
    """What decides about the order besides the sets."""

    seed: int
    rows_per_step: int
    alpha: float
    max_seq_length: int
    pretraining_prob: float = 0.0
    """Chance of the last set; the others split the rest."""

    rank: int = 0
    world: int = 1


class PairLane:
    """The pairs of all sets, step after step."""

    def __init__(
        self, sets: Sequence[TrainSet], order: PairOrder, encode: Callable[[list[str]], list[IntArray]]
    ) -> None:
        self._sets, self._order, self._encode = sets, order, encode
        paired = sets[:-1] if order.pretraining_prob else sets
        weights = np.array([len(item) for item in paired], dtype=np.float64) ** order.alpha
        self._bounds = np.cumsum(weights / weights.sum())

    def start(self) -> State:
        size = self._order.rows_per_step
        return {"row": 0, "window": 0, "first_row": 0, "size": size, "used": [0] * len(self._sets)}

    def choose_set(self, window: int) -> int:
        """The set of a window."""
        order, draw = self._order, key(self._order.seed, "mixture", window)
        if order.pretraining_prob and uniform(key(draw, "window")) < order.pretraining_prob:
            return len(self._sets) - 1
        return min(int(np.searchsorted(self._bounds, uniform(draw), side="right")), len(self._bounds) - 1)

    def open(self, state: State) -> Window:
        number, size = self.choose_set(state["window"]), state["size"]
        pairs, order = self._sets[number], self._order
        numbers, epochs = self._examples(number, state["used"][number], size)
        mine = [i for i in range(size) if (state["first_row"] + i) % order.world == order.rank]
        texts = [
            pairs.texts(int(numbers[i]), key(order.seed, "window", number, int(epochs[i]), int(numbers[i])))
            for i in mine
        ]
        tokens = self._encode([text for row in texts for text in row])
        limit = order.max_seq_length - SPECIALS_PER_SEGMENT
        rows: list[list[Piece]] = [[] for _ in range(size)]
        documents: list[int] = []
        for i, row in zip(mine, texts):
            for _ in row:
                piece = Piece(len(documents), 0, min(limit, len(tokens[len(documents)])))
                documents.append(int(numbers[i]))
                rows[i].append(piece)
        used = [count + size * (index == number) for index, count in enumerate(state["used"])]
        return Window(
            rows=rows,
            get=lambda piece: tokens[piece.document][: piece.length],
            documents=np.array(documents, dtype=np.int64),
            sources=np.full(len(documents), number, dtype=np.int64),
            next_state={
                "row": 0,
                "window": state["window"] + 1,
                "first_row": state["first_row"] + size,
                "size": order.rows_per_step,
                "used": used,
            },
        )

    def _examples(self, number: int, used: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers and epochs of the next `count` examples of a set."""
        pairs = self._sets[number]
        indices = np.arange(used, used + count)
        epochs, within = indices // len(pairs), indices % len(pairs)
        numbers = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            permute = Permutation(len(pairs), key(self._order.seed, "documents", number, epoch))
            numbers[here] = permute(within[here]) + pairs.first
        return numbers, epochs


def step_fractions(sets: Sequence[TrainSet], order: PairOrder) -> list[float]:
    """The fraction of the steps that each set has."""
    paired = sets[:-1] if order.pretraining_prob else sets
    weights: list[Any] = [len(item) ** order.alpha for item in paired]
    fractions = [(1 - order.pretraining_prob) * weight / sum(weights) for weight in weights]
    return [*fractions, order.pretraining_prob] if order.pretraining_prob else fractions
