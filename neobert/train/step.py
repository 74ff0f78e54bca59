"""One optimizer step on a plain module and a plain optimizer.

The loss of a step is the sum over all masked tokens of all micro-batches and ranks, divided by their number: a mean of
means would weigh a token more in a micro-batch that has fewer of them. Nothing here waits for the device.

A step whose loss or gradient is not finite has no effect on any rank, decided on the device without a collective of its
own: a loss that is not finite makes its whole gradient NaN, the reduction of the gradients over ranks carries that to
every rank, and the norm of the reduced gradient shows it. The optimizer reads the resulting flag.

`BatchCopier` brings batches to the device while it still computes the step before. The host runs ahead of a GPU: when a
batch is handed over, the kernels of earlier steps are still queued. A copy in their stream would wait after them, and
the step after the copy. So batches are copied from pinned memory in a stream of their own, which starts at once, and
the compute stream waits for that copy alone. Memory belongs to the copying stream, so the allocator learns that the
compute stream reads it too and hands it out again only after that.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neobert.optim.optimizers import step_unless
from neobert.optim.sharded_weights import whole
from neobert.types import LossSum, MicroBatch, StepBatch, StepCounts

Reduce = Callable[[Sequence[Tensor]], None]
"""Makes the gradients of this rank the mean over all ranks, in place."""

Judge = Callable[[Tensor, Tensor], Tensor]
"""`fn(loss_sum of this rank, grad_norm) -> bool scalar on the device`: whether to skip the step, equal on all ranks."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepResult:
    """What a step leaves on the device; `skipped` is equal on all ranks."""

    loss_sum: Tensor
    """fp32 scalar: this rank's sum over its micro-batches; reduced over ranks when the step's line is written."""

    micro_losses: Tensor
    """fp32 `[n]`: the loss sum of each micro-batch."""

    z_sum: Tensor | None
    """The part of `loss_sum` that is z-loss; None without any."""

    num_correct: Tensor | None
    grad_norm: Tensor
    """Global L2 norm of the gradient before clipping."""

    skipped: Tensor
    """bool scalar: parameters and optimizer state are what they were before the step."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepMetrics:
    """One optimizer step of a run. Tensors stay on the device; numbers are the host's."""

    result: StepResult
    row_keys: tuple[Tensor, ...]
    """Global row numbers of each micro-batch of this rank, on the host."""

    counts: StepCounts
    """Of all ranks."""

    source_tokens: tuple[int, ...]
    """Real tokens of each source in this rank's rows."""

    digest: int
    """This rank's digest; summed over ranks when the step's line is written."""

    lr: float
    data_wait: float
    """Seconds this rank waited for its batch."""


def not_finite(loss_sum: Tensor, grad_norm: Tensor) -> Tensor:
    """Whether the reduced gradient holds a NaN or an infinity: equal on all ranks, and true where any loss did."""
    return ~torch.isfinite(grad_norm)


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    micro_batches: Iterable[MicroBatch],
    *,
    lr: float,
    scale: float,
    muon_beta: float | None = None,
    gradient_clipping: float | None = None,
    judge: Judge = not_finite,
    no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
    reduce: Reduce | None = None,
    observe: Callable[[], None] | None = None,
) -> StepResult:
    """Forward and backward over the micro-batches, clip, update unless `judge` says to skip.

    Args:
        model: returns `LossSum` for a micro-batch.
        optimizer: one that can leave out a step on the device, see `neobert.optim.optimizers`.
        micro_batches: this rank's part of the step, on the model's device.
        lr: learning rate of this step; a group with an `lr_factor` has that many times as much.
        muon_beta: that of this step, for the groups that have one; None leaves it as it was built.
        scale: what a loss sum is multiplied with before backward: `world / number of targets over all ranks`, since
            DistributedDataParallel and FSDP2 average gradients over ranks.
        gradient_clipping: largest global L2 norm of the scaled gradient; None leaves it alone.
        judge: decides about skipping; must not wait for the device.
        no_sync: context for every micro-batch but the last, in which gradients stay on their rank.
        reduce: for a model that does not reduce its gradients itself, as DistributedDataParallel does.
        observe: called when all gradients are there, before clipping.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
        if muon_beta is not None:
            group["muon_beta"] = muon_beta
    batches = list(micro_batches)
    losses: list[LossSum] = []
    for number, batch in enumerate(batches, start=1):
        with no_sync() if number < len(batches) else nullcontext():
            loss = model(batch)
            value = loss.loss_sum.detach()
            # 0 * value is 0, but NaN where the loss is not finite: then every gradient is NaN, on every rank.
            (loss.loss_sum * (scale + 0 * value)).backward()
        losses.append(LossSum(loss_sum=value, num_correct=loss.num_correct, z_sum=loss.z_sum))
    parameters = [p for p in model.parameters() if p.grad is not None]
    if reduce is not None:
        reduce([p.grad for p in parameters if p.grad is not None])
    if observe is not None:
        observe()
    grad_norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if gradient_clipping is not None:
        nn.utils.clip_grads_with_norm_(parameters, gradient_clipping, grad_norm)
    micro_losses = torch.stack([x.loss_sum for x in losses])
    loss_sum = micro_losses.sum()
    skipped = judge(loss_sum, grad_norm)
    step_unless(optimizer, skipped)
    optimizer.zero_grad(set_to_none=True)
    counts = [x.num_correct for x in losses if x.num_correct is not None]
    z_sums = [x.z_sum for x in losses if x.z_sum is not None]
    return StepResult(
        loss_sum=loss_sum,
        micro_losses=micro_losses,
        z_sum=torch.stack(z_sums).sum() if z_sums else None,
        num_correct=torch.stack(counts).sum() if counts else None,
        grad_norm=grad_norm,
        skipped=skipped,
    )


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
        # Only CUDA keeps the memory of a copy that is under way.
        moved = (micro.to(self._device, non_blocking=self._stream is not None) for micro in batch.micro_batches)
        return replace(batch, micro_batches=tuple(moved))
