"""The types that cross the borders between packages. Frozen; they hold data and no behaviour beyond moving it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neobert.model.segments import Segments

IGNORE_INDEX = -100
"""Target of a slot that carries no loss."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WordEdges:
    """How a vocabulary spells words: token b belongs to the word of the token a before it when `is_continued[a]` and
    `continues[b]`. Both are indexed by token id."""

    continues: NDArray[np.bool_]
    is_continued: NDArray[np.bool_]


class Corruption(Protocol):
    """Chooses the targets of a draw, and what replaces tokens."""

    @property
    def is_causal(self) -> bool:
        """Whether a slot predicts the token after it, and attention is causal, instead of the token that is its own."""

    def corrupt(
        self, tokens: NDArray[np.int32], hashes: NDArray[np.uint64], offset: float, *, step: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """`n` tokens, a random hash for each, a number in [0, 1), and the step of training: the corrupted tokens and
        the ascending indices of the slots that predict."""

    def max_targets(self, num_slots: int) -> int:
        """Upper bound of the targets among `num_slots` slots of one draw, at any step."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedRow:
    """One row of at most S tokens: documents side by side, each already wrapped as `[CLS] ... [SEP]`."""

    tokens: NDArray[np.int32]
    """The row's tokens, `sum(lengths)` of them; padding is added when rows become a batch."""

    lengths: tuple[int, ...]
    """Tokens of each segment, [CLS] and [SEP] included."""

    documents: tuple[int, ...]
    """Number of each segment's document in its source."""

    offsets: tuple[int, ...]
    """Where each segment starts in its document, in tokens (0 unless the document was split)."""

    sources: tuple[int, ...]
    """Number of each segment's source (0 without a mixture)."""

    key: int
    """Global row number, counted from the start of the run: it seeds the row's mask."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedBatch:
    """One micro-batch of B rows of S slots, made on the host; shapes depend on the settings, never on the content."""

    input_ids: Tensor
    """int32 `[B, S]`: corrupted tokens, then padding."""

    positions: Tensor
    """int32 `[B, S]`: position of each token in its own segment."""

    segments: Segments

    masked_index: Tensor
    """int64 `[M]`: slots of the flat `[B * S]` stream that are predicted; unused entries point at slot 0."""

    targets: Tensor
    """int64 `[M]`: original token of each predicted slot, with causal segments the token after it; `IGNORE_INDEX` in
    unused entries."""

    row_keys: Tensor
    """int64 `[B]`: global row numbers, on the host."""

    source_tokens: tuple[int, ...]
    """Real tokens of each source."""

    num_tokens: int
    """Real tokens: slots that are not padding."""

    num_targets: int
    num_documents: int
    attended_tokens: int
    """Keys that the tokens of real segments see, the sum of length squared where they see both sides: the attention's
    part of the work, for FLOP counts."""

    digest: int
    """Sum modulo 2**64 of one 64-bit hash a row (tokens, borders, mask): equal batches have equal digests."""

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_slots(self) -> int:
        return self.input_ids.numel()

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """A copy with its tensors on `device`; `row_keys` stays on the host."""
        return self._with_tensors(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """A copy in page-locked host memory, so that `to(..., non_blocking=True)` overlaps with compute."""
        return self._with_tensors(lambda x: x.pin_memory())

    def record_stream(self, stream: Any) -> None:
        """Keeps the memory of tensors on a GPU until what is queued in `stream` now has read it."""
        for x in (self.input_ids, self.positions, self.masked_index, self.targets):
            x.record_stream(stream)
        self.segments.record_stream(stream)

    def _with_tensors(self, move: Any) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("input_ids", "positions", "segments", "masked_index", "targets"):
            values[name] = move(values[name])
        return type(self)(**values)


class MicroBatch(Protocol):
    """What a model computes a loss from: `PackedBatch` in pretraining. Counts are of this rank."""

    @property
    def row_keys(self) -> Tensor:
        """int64 `[B]`: global row numbers, on the host."""

    @property
    def source_tokens(self) -> tuple[int, ...]: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def num_slots(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_targets(self) -> int:
        """Terms of the loss sum."""

    @property
    def num_documents(self) -> int: ...

    @property
    def attended_tokens(self) -> int: ...

    @property
    def digest(self) -> int: ...

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self: ...

    def pin_memory(self) -> Self: ...

    def record_stream(self, stream: Any) -> None: ...


class StepCounts(NamedTuple):
    """What the rows of one optimizer step hold, of one rank or of all."""

    num_targets: int
    num_tokens: int
    num_documents: int
    num_slots: int
    attended_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepBatch:
    """What one rank consumes in one optimizer step, and the loader's state after it: state travels with the data."""

    micro_batches: tuple[MicroBatch, ...]
    state: dict[str, Any]
    """JSON-ready positions of the data order after these rows; save this, never the loader's live state."""

    @property
    def counts(self) -> StepCounts:
        return StepCounts(*(sum(getattr(b, name) for b in self.micro_batches) for name in StepCounts._fields))

    @property
    def source_tokens(self) -> tuple[int, ...]:
        """Real tokens of each source."""
        return tuple(map(sum, zip(*(b.source_tokens for b in self.micro_batches))))

    @property
    def digest(self) -> int:
        return sum(b.digest for b in self.micro_batches) % 2**64


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossSum:
    """What an objective's `forward` returns: sums, because means of means are wrong under uneven masks."""

    loss_sum: Tensor
    """fp32 scalar: sum of the loss over this micro-batch's targets, in nats."""

    num_correct: Tensor | None = None
    """Number of targets predicted exactly, int64 scalar; None when not asked for."""

    z_sum: Tensor | None = None
    """The part of `loss_sum` that is no cross entropy of targets (z-loss, what is learned from a teacher), fp32 scalar;
    None without any."""

    counts: Tensor | None = None
    """`[C]`: what else an evaluation counts or adds up, see `Objective.num_counts`; None without any."""

    outputs: Tensor | None = None
    """fp32 `[M, C]`: what was said of every target; None where an evaluation needs sums alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """Where a run is after `step` optimizer steps. Counts are over all ranks since step 0."""

    step: int = 0
    tokens: int = 0
    targets: int = 0
    documents: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    """Loader state of the batch consumed last; empty before the first step."""

    skip_rows: list[tuple[int, int]] = field(default_factory=list)
    """Half-open ranges of row numbers that this run skips, one for each time it went back to a checkpoint."""

    skipped_steps: list[int] = field(default_factory=list)
    """Those of the last 1,000 steps that were skipped. Filled in when the state is saved."""

    spike_window: list[list[float]] = field(default_factory=list)
    """Loss and gradient norm of the last steps that `trainer.skip_spikes` compares with, oldest first. Filled in when
    the state is saved."""

    interval: dict[str, Any] = field(default_factory=dict)
    """Sums over the steps since the last log line (`IntervalSums`). Filled in when the state is saved."""

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> Self:
        """The state in a `train_state.json`, which holds more than that, and of earlier versions less."""
        return cls(**{f.name: saved[f.name] for f in fields(cls) if f.name in saved})

    def for_new_order(self) -> Self:
        """The state under another order of rows: positions, skipped steps and spikes belong to the old one."""
        return replace(self, data={}, skip_rows=[], skipped_steps=[], spike_window=[])
