"""The engines of `trainer.parallel`: how several processes train one model.

| engine | weights, gradients, optimizer state on a process | exchanged in a step |
|---|---|---|
| `ddp` | all of each | gradients, once |
| `fsdp2` | 1/R of each for R processes, and a whole block while it computes | weights twice, gradients once |
| `hsdp` | 1/S of each for groups of S processes, which are copies | the same in a group, then gradient shards |

DistributedDataParallel comes from Accelerate, `fully_shard` (FSDP2) straight from torch: Accelerate's FSDP2 runs on
GPUs only (on a CPU it trains with DDP and says nothing), takes model and optimizer together, and refuses weights that
are used twice, as a tied vocabulary matrix is. So one code shards over gloo and NCCL.

Every block is a unit of its own, and what is outside of blocks (embeddings, vocabulary projection, last norm) is one
more: it is gathered when the forward pass starts and freed when its gradients are there. In bf16 blocks are gathered in
bf16 and their gradients summed in fp32; matrix products are those of autocast, which casts the same weights the same
way, and the gains of norms are rounded to bf16, which autocast leaves in fp32. What is outside of blocks is gathered in
fp32, since the loss needs it.

In one process every engine is the same: nothing is split, and checkpoints are the usual ones.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.objectives.base import ObjectiveModule
from neobert.train.hardware.machine import Runtime, compute_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """One way to train a model on several processes."""

    name: str
    shards: bool
    """Whether a process holds a part of the weights only."""

    shard: Callable[[Config, Runtime, ObjectiveModule], None] = lambda config, runtime, module: None
    """Splits the weights of the plain module, in place, before the optimizer is made. Collective."""

    wrap: Callable[[Runtime, nn.Module], nn.Module]
    """What is called, from what `build_model` made. Collective."""

    keep_gradients: Callable[[Runtime, nn.Module], AbstractContextManager[Any]]
    """Leaves gradients on their rank: for every micro-batch of a step but the last."""


def choose_engine(config: Config, world: int) -> Engine:
    """The engine of a run; `auto` is DistributedDataParallel.

    Raises:
        StartupError: `trainer.shard_size` does not divide the processes.
    """
    name = config.trainer.parallel
    if name == "hsdp" and world > 1:
        choose_mesh_shape(config, world)
    engine = ENGINES["ddp" if name == "auto" else name]
    return _ALONE if engine.shards and world == 1 else engine


def choose_mesh_shape(config: Config, world: int) -> tuple[int, int]:
    """Groups of `hsdp` and processes of each.

    Raises:
        StartupError: `trainer.shard_size`, or the processes of a machine, do not divide the processes.
    """
    size = config.trainer.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world % size:
        asked = "null, the processes of a machine," if config.trainer.shard_size is None else f"{size}"
        raise StartupError(
            f"trainer.shard_size: {asked} does not divide {world} processes into groups of {size}; write a divisor of "
            f"{world}, or trainer.parallel: fsdp2 to shard over all of them"
        )
    return world // size, size


def build_mesh(config: Config, runtime: Runtime) -> DeviceMesh:
    """The processes as FSDP2 sees them: replicas x shards. Collective."""
    if config.trainer.parallel == "hsdp":
        shape = choose_mesh_shape(config, runtime.world)
        return init_device_mesh(runtime.device.type, shape, mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(runtime.device.type, (runtime.world,), mesh_dim_names=("shard",))


def shard_weights(config: Config, runtime: Runtime, module: ObjectiveModule) -> None:
    """Leaves this rank its part of every weight of `module`; equal weights on all ranks are assumed. Collective."""
    mesh = build_mesh(config, runtime)
    half = compute_dtype(config) == torch.bfloat16
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    blocks = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,
    )
    for block in module.encoder.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=config.trainer.reshard_after_forward, mp_policy=blocks)
    fully_shard(module, mesh=mesh, mp_policy=whole)
    # What stays gathered after the forward is freed by the backward; left so, an evaluation would be of old weights.
    module.register_forward_hook(_free_without_backward)


def _free_without_backward(module: nn.Module, args: Any, output: Any) -> None:
    if not torch.is_grad_enabled():
        for unit in module.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()


def _as_sharded(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule), "made by `shard_weights`"
    return module


def wrap_in_autocast(runtime: Runtime, model: nn.Module) -> nn.Module:
    """`model` under autocast, where the run computes in bf16; hooks of its sharding stay around it."""
    forward, autocast = model.forward, runtime.accelerator.autocast

    def forward_under_autocast(batch: Any) -> Any:
        with autocast():
            return forward(batch)

    model.forward = forward_under_autocast  # type: ignore[method-assign]
    return model


@contextmanager
def keep_sharded_gradients(runtime: Runtime, model: nn.Module) -> Iterator[None]:
    """Gradients of whole weights stay on their rank, in fp32, and are added up there."""
    sharded = _as_sharded(model)
    sharded.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        sharded.set_requires_gradient_sync(True)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, what of `module` is outside of its blocks is there as a whole; for modules that are not sharded nothing
    happens. Collective."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


# What Accelerate would prepare with its FSDP, where a launcher asked for that and started one process.
_ALONE = Engine(name="ddp", shards=False, wrap=wrap_in_autocast, keep_gradients=Runtime.no_sync)

_sharded = partial(
    Engine, shards=True, shard=shard_weights, wrap=wrap_in_autocast, keep_gradients=keep_sharded_gradients
)

ENGINES: dict[str, Engine] = {
    "ddp": Engine(name="ddp", shards=False, wrap=Runtime.prepare_model, keep_gradients=Runtime.no_sync),
    "fsdp2": _sharded(name="fsdp2"),
    "hsdp": _sharded(name="hsdp"),
}
"""Values of `trainer.parallel`; `auto` chooses one."""
