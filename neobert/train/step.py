"""One optimizer step on a plain module and a plain optimizer.

The loss of a step is the sum over all masked tokens of all micro-batches and ranks, divided by their number: a mean of
means would weigh a token more in a micro-batch that has fewer of them. Nothing here waits for the device.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neobert.types import LossSum, PackedBatch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepResult:
    """What a step leaves on the device."""

    loss_sum: Tensor
    """fp32 scalar: this rank's sum over its micro-batches."""

    num_correct: Tensor | None
    grad_norm: Tensor | None
    """Global L2 norm of the gradient before clipping."""


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    micro_batches: Iterable[PackedBatch],
    *,
    lr: float,
    scale: float,
    gradient_clipping: float | None = None,
    measure_grad_norm: bool = True,
    no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> StepResult:
    """Forward and backward over the micro-batches, clip, update.

    Args:
        model: returns `LossSum` for a `PackedBatch`.
        micro_batches: this rank's share of the step, on the model's device.
        lr: learning rate of this step.
        scale: what a loss sum is multiplied with before backward: `world / number of targets over all ranks`, since
            DistributedDataParallel averages gradients over ranks.
        gradient_clipping: largest global L2 norm of the scaled gradient; None leaves it alone.
        no_sync: context for every micro-batch but the last, in which gradients stay on their rank.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    batches = list(micro_batches)
    losses: list[LossSum] = []
    for number, batch in enumerate(batches, start=1):
        with no_sync() if number < len(batches) else nullcontext():
            loss = model(batch)
            (loss.loss_sum * scale).backward()
        losses.append(LossSum(loss_sum=loss.loss_sum.detach(), num_correct=loss.num_correct))
    grad_norm = None
    parameters = [p for p in model.parameters() if p.grad is not None]
    if gradient_clipping is not None:
        grad_norm = nn.utils.clip_grad_norm_(parameters, gradient_clipping)
    elif measure_grad_norm:
        grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    counts = [x.num_correct for x in losses if x.num_correct is not None]
    return StepResult(
        loss_sum=torch.stack([x.loss_sum for x in losses]).sum(),
        num_correct=torch.stack(counts).sum() if counts else None,
        grad_norm=grad_norm,
    )
