"""Which examples a step takes: all of them in an order that is drawn again for every epoch.

Rows come from one lane. A window is a stretch of an epoch, and an epoch is a permutation keyed by (seed, epoch), so the
state is a few numbers. A step that ends an epoch takes its last rows from the next one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neobert.data.rows.collate import build_row
from neobert.data.rows.lanes import State, Window
from neobert.data.rows.order import Permutation, key
from neobert.data.rows.packing import Piece
from neobert.data.rows.side_by_side import SideBySide, digest_rows
from neobert.data.tokenizer import Tokenizer
from neobert.objectives.classification import Kind, LabelledBatch
from neobert.types import PackedRow

WINDOW_ROWS = 4096
"""Examples of a window."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenExamples:
    """Examples as tokens and targets, by their numbers."""

    kind: Kind
    tokens: Sequence[NDArray[np.int32]]
    """Of each, without the [CLS] before and the [SEP] after it."""

    firsts: Sequence[NDArray[np.int64]]
    """See `EncodedRows.firsts`."""

    targets: Sequence[NDArray[np.int64] | NDArray[np.float32] | int | float]
    """See `number_labels`; of words those of all of them, whether they were cut off or not."""

    def __len__(self) -> int:
        return len(self.tokens)

    def window(self, numbers: NDArray[np.int64], next_state: State) -> Window:
        """A row for each of these examples."""
        chosen = numbers.tolist()
        return Window(
            rows=[[Piece(index, 0, len(self.tokens[number]))] for index, number in enumerate(chosen)],
            get=lambda piece: self.tokens[chosen[piece.document]],
            documents=numbers,
            sources=np.zeros(len(numbers), dtype=np.int64),
            next_state=next_state,
        )

    def build_rows(self, numbers: Sequence[int], tokenizer: Tokenizer) -> list[PackedRow]:
        """The rows of an evaluation; their keys are their numbers."""
        window = self.window(np.array(numbers, dtype=np.int64), {})
        return [
            build_row(pieces, window, number, cls_id=tokenizer.cls_id, sep_id=tokenizer.sep_id)
            for pieces, number in zip(window.rows, numbers)
        ]


class ExampleLane:
    """Epoch after epoch of the examples."""

    def __init__(self, examples: TokenExamples, seed: int) -> None:
        self._examples, self._seed = examples, seed

    def start(self) -> State:
        return {"epoch": 0, "window": 0, "row": 0}

    def open(self, state: State) -> Window:
        epoch, window, total = state["epoch"], state["window"], len(self._examples)
        first = window * WINDOW_ROWS
        last = min(first + WINDOW_ROWS, total)
        numbers = Permutation(total, key(self._seed, "documents", epoch))(np.arange(first, last))
        ended = last == total
        next_state = {"epoch": epoch + ended, "window": 0 if ended else window + 1, "row": 0}
        return self._examples.window(numbers.astype(np.int64), next_state)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExampleCollator:
    """Rows -> a `LabelledBatch`; a pure function of the rows and of these settings."""

    examples: TokenExamples
    texts: SideBySide

    def __call__(self, rows: Sequence[PackedRow], *, step: int = 0) -> LabelledBatch:
        numbers = [row.documents[0] for row in rows]
        lengths = np.array([len(row.tokens) for row in rows], dtype=np.int64)
        index, targets = self._find_targets(numbers, np.cumsum(lengths) - lengths)
        return LabelledBatch(
            texts=self.texts(rows),
            lengths=torch.from_numpy(lengths),
            index=torch.from_numpy(index),
            targets=targets,
            row_keys=torch.tensor([row.key for row in rows], dtype=torch.int64),
            digest=digest_rows(rows),
        )

    def _find_targets(self, numbers: Sequence[int], starts: NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor]:
        found = [self.examples.targets[number] for number in numbers]
        kind = self.examples.kind
        if kind != "tokens":
            dtype = np.int64 if kind == "classification" else np.float32
            return np.empty(0, dtype=np.int64), torch.from_numpy(np.array(found, dtype=dtype))
        firsts = [self.examples.firsts[number] for number in numbers]
        # One more for [CLS].
        index = [start + 1 + first[first >= 0] for start, first in zip(starts, firsts)]
        targets = [np.asarray(target)[first >= 0] for target, first in zip(found, firsts)]
        return np.concatenate(index), torch.from_numpy(np.concatenate(targets).astype(np.int64))
