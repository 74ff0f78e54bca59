"""What a step of contrastive fine-tuning computes a loss from."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import torch
from torch import Tensor

from neobert.types import PackedBatch

Kind = Literal["infonce", "simcse", "supcon", "cosent", "distill", "mlm"]
"""The loss of a step."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairBatch:
    """The rows of one process in one step."""

    kind: Kind
    chunks: tuple[PackedBatch, ...]
    """Stretches of the texts that go through the encoder one after the other."""

    lengths: tuple[Tensor, ...]
    """int64 `[texts]` of each chunk: tokens of every text."""

    anchors: Tensor
    """int64 `[N]`: index of each row's first text among all texts."""

    positives: Tensor
    """int64 `[N]`: of its second text; equal to `anchors` where rows have one."""

    negatives: Tensor
    """int64 `[N, K]`: of its negatives; 0 where there is none."""

    has_negative: Tensor
    """bool `[N, K]`."""

    text_ids: Tensor
    """int64 `[texts]`: equal for equal texts."""

    scores: Tensor
    """fp32 `[N]`: similarity of scored pairs, number of the class of labelled texts, else 0."""

    row_keys: Tensor
    """int64 `[N]`: global row numbers, on the host."""

    source_tokens: tuple[int, ...]
    num_targets: int
    """Rows; for `mlm` the masked tokens."""

    digest: int

    @property
    def num_rows(self) -> int:
        return len(self.row_keys)

    @property
    def num_slots(self) -> int:
        return sum(chunk.num_slots for chunk in self.chunks)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_documents(self) -> int:
        return sum(chunk.num_documents for chunk in self.chunks)

    @property
    def attended_tokens(self) -> int:
        return sum(chunk.attended_tokens for chunk in self.chunks)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """A copy with its tensors on `device`; `row_keys` stays on the host."""
        return self._moved(
            lambda x: x.to(device, non_blocking=non_blocking), lambda x: x.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> Self:
        """A copy in page-locked host memory."""
        return self._moved(lambda x: x.pin_memory(), lambda x: x.pin_memory())

    def record_stream(self, stream: Any) -> None:
        """Keeps the memory of tensors on a GPU until what is queued in `stream` now has read it."""
        for chunk in self.chunks:
            chunk.record_stream(stream)
        own = (self.anchors, self.positives, self.negatives, self.has_negative, self.text_ids, self.scores)
        for tensor in (*self.lengths, *own):
            tensor.record_stream(stream)

    def _moved(self, chunk: Callable[[PackedBatch], PackedBatch], tensor: Callable[[Tensor], Tensor]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["chunks"] = tuple(map(chunk, self.chunks))
        values["lengths"] = tuple(map(tensor, self.lengths))
        for name in ("anchors", "positives", "negatives", "has_negative", "text_ids", "scores"):
            values[name] = tensor(values[name])
        return type(self)(**values)
