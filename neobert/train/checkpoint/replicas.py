"""Whether all ranks hold the same weights and optimizer state: at the start, at evaluations and before saves.

Ranks apply the same gradient to the same weights, so their copies stay equal to the last bit without ever being
compared; a checkpoint holds those of rank 0. What makes them differ (other settings, other files, a damaged memory)
makes each rank silently train a model of its own. A sum over the bits of every tensor shows it, at the price of
reading them once.

Machines whose processors round differently, or that add with another number of threads, drift apart in the last bits
and stay near each other, since the gradients are shared: up to `ROUNDING` that is a warning.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neobert.data.rows.loader import merge_states
from neobert.optim.sharded_weights import is_sharded
from neobert.train.hardware.machine import Runtime
from neobert.train.processes.agreement import RankError, differ, exchange
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
    data_states = exchange(run.runtime, state.data)
    if state.data:
        merge_states(data_states)


def list_tensors(module: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """Weights, and the optimizer's tensors of each, by name; without those of which each rank holds another part."""
    tensors = {f"weights {name}": tensor for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        values = {} if optimizer is None else optimizer.state.get(parameter, {})
        tensors |= {f"{key} of {name}": value for key, value in values.items() if isinstance(value, Tensor)}
    return {name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)}


def compare_tensors(runtime: Runtime, tensors: Mapping[str, Tensor], when: str, warn: Callable[[str], None]) -> None:
    """Raises when tensors of the ranks differ by more than rounding, and warns when they differ at all. Collective.

    Raises:
        RankError: on every rank.
    """
    if runtime.world == 1:
        return
    own = checksums(tensors)
    if not differ(runtime, own):
        return
    every = exchange(runtime, own)
    absent = {rank for rank, sums in enumerate(every) if sums.keys() != every[0].keys()}
    if absent:
        raise RankError(_describe(min(absent), when, "it has other tensors"))
    names = [name for name in every[0] if len({sums[name] for sums in every}) > 1]
    distances = {name: _distance(tensors[name], runtime.from_main(tensors[name])) for name in names}
    name = max(distances, key=distances.__getitem__)
    largest, name, rank = max((d, n, r) for r, (d, n) in enumerate(exchange(runtime, (distances[name], name))))
    measured = f"most in {name}: by {largest:.1e} of its length"
    if not largest < ROUNDING:
        raise RankError(_describe(rank, when, measured))
    warn(
        f"{when} weights and optimizer state of rank {rank} differ from those of rank 0 by rounding, {measured}: "
        "processors or numbers of threads differ; checkpoints hold those of rank 0"
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


def _describe(rank: int, when: str, how: str) -> str:
    return (
        f"{when} weights or optimizer state of rank {rank} differ from those of rank 0 ({how}): the processes train "
        "different models, so the run stops and saves nothing. Give every process the same code, packages and files; "
        "what was saved before is good: resume with trainer.resume_from_checkpoint: latest. When it happens again, "
        "test the memory of that machine"
    )
