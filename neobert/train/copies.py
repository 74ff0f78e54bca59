"""Batches go to the device while it still computes the step before.

The host runs ahead of a GPU: when a batch is handed over, the kernels of earlier steps are still queued. A copy in
their stream would wait behind them, and the step behind the copy. So batches are copied from pinned memory in a stream
of their own, which starts at once, and the compute stream waits for that copy alone. Memory belongs to the copying
stream, hence the allocator is told that the compute stream reads it too and hands it out again only after that.
"""

from dataclasses import replace
from typing import Any

import torch

from neobert.types import StepBatch


class BatchCopier:
    """Copies the batches of a run to its device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, batch: StepBatch) -> StepBatch:
        """The same batch with its tensors on the device, ready for whatever is queued after this call."""
        if self._stream is None:
            return self._moved(batch)
        with torch.cuda.stream(self._stream):
            moved = self._moved(batch)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for micro in moved.micro_batches:
            micro.record_stream(computing)
        return moved

    def _moved(self, batch: StepBatch) -> StepBatch:
        return replace(
            batch, micro_batches=tuple(micro.to(self._device, non_blocking=True) for micro in batch.micro_batches)
        )
