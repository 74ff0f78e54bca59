"""Segments: where each document of a packed batch starts and ends."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segments:
    """The documents of a `[B, S]` batch, seen as one stream of `T = B * S` tokens.

    A padded batch is a packed batch: the padding at the end of a row is a segment of its own, so every token belongs
    to exactly one segment and no attention row is ever empty.
    """

    ids: Tensor
    """int32 `[B, S]`: 0 for padding, else the number of the document within its row, from 1."""

    cu_seqlens: Tensor
    """int32 `[N]`: borders of the segments in the token stream, from 0 to T; filled up with T to a constant length,
    which kernels do without where they can: see `attention.prepare_varlen`."""

    cu_seqlens_cpu: Tensor
    """The same borders, always on the host: code that must loop over segments reads these without a device sync."""

    max_seqlen: int
    """Upper bound of the length of a segment, padding included: constant over a run, so that kernels never
    re-specialise."""

    causal: bool = False
    """Whether a token sees only itself and those before it in its document."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Segments":
        """A copy on `device`; the host borders stay on the host."""
        return replace(
            self,
            ids=self.ids.to(device, non_blocking=non_blocking),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: Any) -> None:
        """Keeps the memory of tensors on a GPU until what is queued in `stream` now has read it."""
        for x in (self.ids, self.cu_seqlens):
            x.record_stream(stream)

    def pin_memory(self) -> "Segments":
        """A copy in page-locked host memory."""
        return replace(self, ids=self.ids.pin_memory(), cu_seqlens=self.cu_seqlens.pin_memory())
