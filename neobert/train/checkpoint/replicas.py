"""Whether all ranks hold the same weights and optimizer state: at the start, at evaluations and before saves.

Ranks apply the same gradient to the same weights, so their copies stay equal to the last bit without ever being
compared; a checkpoint holds those of rank 0. What makes them differ (other settings, other files, a damaged memory)
makes each rank silently train a model of its own. A sum over the bits of every tensor shows it, at the price of
reading them once.

Machines whose processors round differently, or that add with another number of threads, drift apart in the last bits
and stay near each other, since the gradients are shared: up to `ROUNDING` that is a warning.

Under `fsdp2` every rank holds another part, and nothing is there twice. Under `hsdp` each part has a copy in every
group, which is compared with that of the first group.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from neobert.data.rows.loader import merge_states
from neobert.optim.sharded_weights import local
from neobert.train.hardware.machine import Runtime
from neobert.train.processes.agreement import RankError, exchange, meet, send_to_main, sharing_errors
from neobert.types import TrainState

if TYPE_CHECKING:
    from neobert.train.run import Run

ROUNDING = 1e-3
"""Of the length of a tensor: a larger difference is none of rounding."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> integers of that size."""


def check_replicas(run: "Run", state: TrainState) -> None:
    """Raises when a rank's weights, optimizer state or position in the data is not that of the others. Collective.

    Raises:
        RankError: with the rank, the tensor that differs most, and by how much; `events.jsonl` has it too.
        DataError: ranks have read the same data differently.
    """
    if run.runtime.world == 1:
        return
    tensors, when = list_tensors(run.module, run.optimizer), f"after step {state.step}"
    try:
        compare_tensors(run.runtime, tensors, when, run.tracker.warn)
    except RankError as error:
        run.tracker.event("ranks_differ", state.step, problem=str(error))
        raise
    with sharing_errors(run.runtime):
        data_states = send_to_main(run.runtime, state.data)
        if data_states is not None and state.data:
            merge_states(data_states)


def list_tensors(module: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """Weights, and the optimizer's tensors of each, by name."""
    tensors = {f"weights {name}": tensor for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        values = {} if optimizer is None else optimizer.state.get(parameter, {})
        tensors |= {f"{key} of {name}": value for key, value in values.items() if isinstance(value, Tensor)}
    return tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """Where a rank finds the tensors that its own have to equal."""

    first: int
    """The rank that has them."""

    from_first: Callable[[Tensor], Tensor]
    """That rank's values of a tensor. Collective."""


def find_copies(runtime: Runtime, tensor: Tensor) -> Copies | None:
    """Whose copy a tensor is; None where no other rank has the same part of it."""
    if not isinstance(tensor, DTensor):
        return Copies(first=0, from_first=runtime.from_main)
    mesh = tensor.device_mesh
    if mesh.ndim == 1:
        return None
    group = mesh.get_group(0)
    first = dist.get_global_rank(group, 0)

    def from_first(values: Tensor) -> Tensor:
        copy = values.detach().to(runtime.device, copy=True).contiguous()
        dist.broadcast(copy, src=first, group=group)
        return copy.to(values.device)

    return Copies(first=first, from_first=from_first)


def compare_tensors(runtime: Runtime, tensors: Mapping[str, Tensor], when: str, warn: Callable[[str], None]) -> None:
    """Raises when tensors of the ranks differ by more than rounding, and warns when they differ at all. Collective.

    Raises:
        RankError: on every rank.
    """
    if runtime.world == 1:
        return
    for is_shard in (False, True):  # What all ranks have a copy of, and what groups have.
        chosen = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor) == is_shard}
        copies = find_copies(runtime, next(iter(chosen.values()))) if chosen else None
        if copies is not None:
            _compare(runtime, copies, {name: local(tensor) for name, tensor in chosen.items()}, when, warn)


def _compare(
    runtime: Runtime, copies: Copies, tensors: Mapping[str, Tensor], when: str, warn: Callable[[str], None]
) -> None:
    own = checksums(tensors)
    digest = torch.frombuffer(bytearray(hashlib.sha256(json.dumps(own).encode()).digest()), dtype=torch.uint8)
    if not meet(runtime, flag=not torch.equal(copies.from_first(digest), digest)):
        return
    every = exchange(runtime, (copies.first, own))
    absent = {rank for rank, (first, sums) in enumerate(every) if sums.keys() != every[first][1].keys()}
    if absent:
        raise RankError(_describe(min(absent), every[min(absent)][0], when, "it has other tensors"))
    names = [name for name in own if any(sums[name] != every[first][1][name] for first, sums in every)]
    distances = {name: _distance(tensors[name], copies.from_first(tensors[name])) for name in names}
    name = max(distances, key=distances.__getitem__)
    largest, name, rank = max((d, n, r) for r, (d, n) in enumerate(exchange(runtime, (distances[name], name))))
    first, measured = every[rank][0], f"most in {name}: by {largest:.1e} of its length"
    if not largest < ROUNDING:
        raise RankError(_describe(rank, first, when, measured))
    warn(
        f"{when} weights and optimizer state of rank {rank} differ from those of rank {first} by rounding, {measured}: "
        f"processors or numbers of threads differ; checkpoints hold those of rank {first}"
    )


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The sum over the bits of each tensor, as integers; the device is waited for once."""
    if not tensors:
        return {}
    device = next(iter(tensors.values())).device
    sums = [_as_integers(tensor).sum(dtype=torch.int64).to(device) for tensor in tensors.values()]
    return dict(zip(tensors, torch.stack(sums).tolist()))


def _as_integers(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(_BITS[tensor.element_size()])


def _distance(mine: Tensor, theirs: Tensor) -> float:
    """Relative, infinite where it is not a number."""
    length = torch.linalg.vector_norm(theirs.double()).clamp(min=1e-30)
    distance = (torch.linalg.vector_norm(mine.detach().double() - theirs.double()) / length).item()
    return distance if distance == distance else float("inf")


def _describe(rank: int, first: int, when: str, how: str) -> str:
    return (
        f"{when} weights or optimizer state of rank {rank} differ from those of rank {first} ({how}): the processes "
        "train different models, so the run stops and saves nothing. Give every process the same code, packages and "
        "files; what was saved before is good: resume with trainer.resume_from_checkpoint: latest. When it happens "
        "again, test the memory of that machine"
    )
