"""Memory of this process and of this machine, and what to say when it does not suffice.

What a control group leaves (containers, batch systems) counts when it is less than what the machine has free. Page
cache that can be dropped counts as free.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from neobert.host import control_groups
from neobert.types import MicroBatch

if TYPE_CHECKING:
    from neobert.train.run import Run


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up: torch's on a GPU, torch's on a CPU, Python's, or that of a library on the GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = (
    "can't allocate memory",  # torch on a CPU
    "CUDA out of memory",  # torch on a GPU, within an error of the compiler
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "Triton Error [CUDA]: out of memory",
    "cudaErrorMemoryAllocation",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its handle takes memory
    "CUDNN_STATUS_ALLOC_FAILED",
    "Cuda failure 'out of memory'",  # NCCL, in some releases with a number after "failure"
    "Cuda failure 2 'out of memory'",
    "HIP out of memory",
    "HIP error: out of memory",
    "MPS backend out of memory",
)
"""Parts of the messages of errors that are a RuntimeError, of no kind of their own."""


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that this process and others of the same group can still take.

    Raises:
        OSError: the system does not report it; it is not Linux.
    """
    free = _read_field(root / "proc/meminfo", "MemAvailable") * 1024
    return min([free, *_left_in_groups(root)])


def current_bytes() -> int:
    """Memory of this process that is in use now (resident set).

    Raises:
        OSError: the system does not report it; it is not Linux.
    """
    return _read_field(Path("/proc/self/status"), "VmRSS") * 1024


def swapped_bytes() -> int:
    """Memory of this process that is in swap.

    Raises:
        OSError: the system does not report it; it is not Linux.
    """
    return _read_field(Path("/proc/self/status"), "VmSwap") * 1024


def peak_bytes() -> int:
    """Highest `current_bytes` since `forget_peak`, or since the process started.

    Raises:
        OSError: the system does not report it; it is not Linux.
    """
    return _read_field(Path("/proc/self/status"), "VmHWM") * 1024


def forget_peak() -> None:
    """Has the system measure the peak again, from what is in use now.

    Memory that was freed and that the C library keeps is returned first: a step that reused it would seem to need
    none.

    Raises:
        OSError: the system does not do that; it is not Linux with glibc, or /proc is read-only.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError as error:
        raise OSError("the C library has no malloc_trim") from error
    Path("/proc/self/clear_refs").write_text("5")


def _read_field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    raise OSError(f"{path} has no {name}")


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each control group around this process leaves of its limit."""
    for group in control_groups("memory", root):
        limit, used, reclaimable = _FILES[group.version]
        if (text := group.read(limit)) not in (None, "max"):
            statistics = dict(line.split() for line in (group.read("memory.stat") or "").splitlines())
            yield int(text) - int(group.read(used) or 0) + int(statistics.get(reclaimable, 0))


_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""Limit, use, and the part of the use that can be dropped (in memory.stat), by version of the interface."""


class OutOfMemory(Exception):
    """A step needed more memory than there is; the message has its shape and the keys to change."""


@contextmanager
def memory_explained(run: "Run", batch: MicroBatch, task: Literal["train", "eval"]) -> Iterator[None]:
    """Raises OutOfMemory, with the allocator's error as its cause, when the block runs out of memory.

    The run ends there: a smaller batch tried silently would be another run.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        rows, slots = batch.num_rows, batch.num_slots // batch.num_rows
        peak = run.runtime.peak_memory_bytes() / 2**30
        message = (
            f"out of memory after step {run.tracker.step} in {_BATCH_NAMES[task]} of {rows} rows of {slots} slots on "
            f"{run.runtime.device}, at a peak of {peak:.2f} GiB; lower trainer.per_device_{task}_batch_size "
            f"({rows} rows){_REMEDIES[task]}"
        )
        run.tracker.event("out_of_memory", run.tracker.step, rows=rows, slots=slots, peak_gib=peak)
        raise OutOfMemory(message) from error


_BATCH_NAMES = {"train": "a training micro-batch", "eval": "an evaluation batch"}
_REMEDIES = {
    "train": ", with trainer.global_batch_size to keep the rows of a step; or set trainer.gradient_checkpointing: true "
    "or a smaller dataset.max_seq_length",
    "eval": ", which changes no result",
}
