"""Optimizer state in a checkpoint: one file where every rank has all of it, else one for each rank that holds a part.

| engine | files |
|---|---|
| `ddp`, one process | `optimizer.bin`, a state dict of torch |
| `fsdp2`, `hsdp` | `optimizer/shard-<rank>.safetensors`, in the layout of torch.distributed.checkpoint |

Shards are what `HuggingFaceStorageWriter(save_distributed=True)` of torch.distributed.checkpoint writes: plain
safetensors whose headers say where in the whole tensor each begins. So nothing has to be gathered or agreed upon to
write them, they are parts of the commit like any other file, no pickle is read, and torch's reader gives any number of
processes, and any engine, the rows it needs.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import zeros as dtensor_zeros
from torch.optim import Optimizer

from neobert.optim.owners import first_row
from neobert.optim.sharded_weights import is_sharded, shard_like
from neobert.train.checkpoint.commit import Write

OPTIMIZER_FILE, OPTIMIZER_FOLDER = "optimizer.bin", "optimizer"

_SEPARATOR = "/"
"""Between the name of a weight and what the optimizer calls its tensor."""


def name_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors, as `<name of the weight>/<name in its state>`."""
    return {
        f"{name}{_SEPARATOR}{key}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def build_shard_files(rank: int, optimizer: Optimizer, copy: Callable[[Tensor], Tensor]) -> dict[str, Write]:
    """This rank's part of the optimizer's state: what is sharded and no other rank has, and on rank 0 what is not."""
    tensors: dict[str, Tensor] = {}
    offsets: dict[str, dict[str, list[int]]] = {}
    for name, value in name_state(optimizer).items():
        if isinstance(value, DTensor) and is_own(value):
            tensors[name] = copy(value.to_local()).cpu().contiguous()
            offsets[name] = {"saved_offsets": [first_row(value), *[0] * (value.ndim - 1)]}
        elif not is_sharded(value) and rank == 0:
            tensors[name] = copy(value).cpu().reshape(-1) if value.ndim == 0 else copy(value).cpu().contiguous()
            offsets[name] = {"saved_offsets": [0] * max(1, value.ndim)}
    if not tensors:
        return {}
    # With a second key in the header its bytes would be random.
    header = {"DCP_SHARDING_INFO": json.dumps(offsets)}

    def write(path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path, metadata=header)

    return {f"{OPTIMIZER_FOLDER}/shard-{rank:05d}.safetensors": write}


def is_own(value: DTensor) -> bool:
    """Whether this rank writes its part: it is not empty, and the first of the copies that `hsdp` has."""
    coordinate = value.device_mesh.get_coordinate()
    assert coordinate is not None, "every rank is in the mesh"
    return value.to_local().numel() > 0 and not any(coordinate[:-1])


def load_shards(folder: Path, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state that `build_shard_files` wrote, as a state dict of an optimizer of one group; this rank reads the rows
    that it holds of each parameter.

    Raises:
        OSError, ValueError: files are missing or do not fit.
    """
    reader = HuggingFaceStorageReader(str(folder))
    found = reader.read_metadata().state_dict_metadata
    values: dict[str, Any] = {}
    for name, stored in found.items():
        like = parameters[name.rpartition(_SEPARATOR)[0]]
        size = torch.Size(stored.size)  # type: ignore[union-attr]
        dtype = stored.properties.dtype  # type: ignore[union-attr]
        values[name] = _build_zeros(name, size, dtype, like)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # That nothing is communicated, which is what `no_dist` asks for.
        dcp.load(values, storage_reader=reader, no_dist=True)
    names = list(dict.fromkeys(name.rpartition(_SEPARATOR)[0] for name in values))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in values.items():
        weight, _, key = name.rpartition(_SEPARATOR)
        state.setdefault(names.index(weight), {})[key] = value.reshape(()) if key == "step" else value
    return {"state": state, "param_groups": [{"names": names, "params": list(range(len(names)))}]}


def _build_zeros(name: str, size: torch.Size, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Memory for this rank's part of a stored tensor: rows as those of its weight, a count of steps as a whole."""
    if isinstance(like, DTensor) and not name.endswith(f"{_SEPARATOR}step") and _has_rows_of(size, like):
        return dtensor_zeros(size, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)
    return torch.zeros(size, dtype=dtype, device=like.device)


def _has_rows_of(size: torch.Size, parameter: Tensor) -> bool:
    """Whether a state has a row for each row of its weight, as NorMuon's `[rows, 1]`."""
    return len(size) == parameter.ndim and size[:1] == parameter.shape[:1]


def shard_state(state: Mapping[Any, Mapping[str, Any]], parameters: Iterable[Tensor]) -> dict[Any, dict[str, Any]]:
    """Whole tensors of a state dict, cut as the parameters are that they belong to."""
    return {
        index: {
            key: shard_like(value, parameter)
            if isinstance(value, Tensor)
            and key != "step"
            and not is_sharded(value)
            and _has_rows_of(value.shape, parameter)
            else value
            for key, value in state[index].items()
        }
        for index, parameter in enumerate(parameters)
        if index in state
    }
