"""Values of all processes on every process, with exact gradients.

Every process computes the loss of its own rows against the embeddings of all. The gradient of the sum of these losses
with respect to one process's embeddings has a part from every process: the backward adds them up.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _all_gather(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)  # the given one may be somebody else's too
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def _all_gather(values: Tensor) -> Tensor:
    values = values.contiguous()
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)


def gather(values: Tensor) -> Tensor:
    """Rows of all processes in rank order, `[W * n, ...]` of `[n, ...]`; as many on every process. Differentiable."""
    if not is_distributed():
        return values
    return _Gather.apply(values) if values.requires_grad else _all_gather(values)


def is_distributed() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first_row(num_rows: int) -> int:
    """Where this process's rows begin among those that `gather` gives."""
    return dist.get_rank() * num_rows if is_distributed() else 0
