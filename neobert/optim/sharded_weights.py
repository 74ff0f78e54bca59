"""Tensors of which each rank holds a part (torch's DTensor), as FSDP2 keeps weights, gradients and optimizer state.

Everything here passes plain tensors through as they are, so that its callers need not know which kind they have.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank may hold a part only."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, as a plain one in the same memory: all of it, or its shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`local` of each: enough for elementwise updates."""
    return [local(tensor) for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor as a plain one; of a sharded one, collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """`full`, which every rank has, on the device of `like` and sharded as it is. Nothing is communicated."""
    moved = full.to(like.device)
    if not isinstance(like, DTensor):
        return moved
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def sum_over_shards(values: list[Tensor], like: Tensor) -> list[Tensor]:
    """Scalars that each rank has of its part of tensors sharded as `like`, summed over the parts; of plain tensors the
    scalars as they are. Collective, once for all."""
    if not isinstance(like, DTensor):
        return values
    placements = [Partial() if placement.is_shard() else placement for placement in like.placements]
    return list(DTensor.from_local(torch.stack(values), like.device_mesh, placements).full_tensor().unbind())


@torch.no_grad()
def load_whole(targets: dict[str, Tensor], full: dict[str, Tensor]) -> None:
    """Copies whole tensors into `targets`, of which ranks may hold parts.

    Raises:
        KeyError: names differ.
        ValueError: a shape differs.
    """
    if targets.keys() != full.keys():
        raise KeyError(", ".join(sorted(targets.keys() ^ full.keys())))
    for name, target in targets.items():
        if target.shape != full[name].shape:
            raise ValueError(f"{name} has shape {list(full[name].shape)}, expected {list(target.shape)}")
        target.copy_(shard_like(full[name].to(target.dtype), target))
