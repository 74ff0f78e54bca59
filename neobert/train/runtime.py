"""Where a run executes: device, precision, process group, and whether the machine can do what the config asks for.

Accelerate brings device placement, autocast and DistributedDataParallel. The loader, the schedule, gradient
accumulation and checkpoints are ours, so `Accelerator` prepares the model and nothing else.
"""

import importlib.util
import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from neobert.config.schema import Config
from neobert.config.secrets import Scrubbed
from neobert.kernels.linear_cross_entropy import choose_kernel


class StartupError(Scrubbed):
    """The run cannot start; the message names the key and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Runtime:
    """Device and process group of this process."""

    accelerator: Accelerator
    device: torch.device
    rank: int
    world: int
    host_group: Any
    """Process group of host-side collectives; None in a single process."""

    patient_group: Any
    """The same for waiting while rank 0 prepares data, which may take hours."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def with_precision(self, mixed_precision: str) -> Self:
        """This runtime, computing in another precision: `no` or `bf16`. Call it before `prepare_model`."""
        return replace(self, accelerator=_build_accelerator(self.device.type, mixed_precision))

    def prepare_model(self, module: nn.Module) -> nn.Module:
        """`module` on the device, under autocast, and wrapped by DistributedDataParallel in several processes."""
        return self.accelerator.prepare_model(module)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Leaves gradients unreduced: for every micro-batch of a step but the last."""
        return self.accelerator.no_sync(model) if self.world > 1 else nullcontext()

    def sum_on_host(self, values: Sequence[int]) -> list[int]:
        """Sums integers over all ranks without touching the device."""
        if self.world == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(totals, group=self.host_group)
        return totals.tolist()

    def sum_on_device(self, values: Tensor) -> Tensor:
        """Sums a tensor over all ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def max_on_device(self, values: Tensor) -> Tensor:
        """The elementwise maximum of a tensor over all ranks."""
        if self.world > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value, group=self.host_group)
        return gathered

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.host_group)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do, however long that takes."""
        if self.world > 1 and not self.is_main:
            dist.barrier(group=self.patient_group)
        yield
        if self.world > 1 and self.is_main:
            dist.barrier(group=self.patient_group)

    def peak_memory_bytes(self) -> int:
        """Highest memory in use so far: of the device's allocator on a GPU, of the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def close(self) -> None:
        """Leaves the process group and forgets this run's precision, so that another run can start in this process."""
        self.accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


PATIENCE = timedelta(days=7)
"""How long processes wait for rank 0 to tokenise; one that dies is noticed at once."""


def compute_dtype(config: Config) -> torch.dtype:
    """Type of the matrix products; `trainer.mixed_precision` must be bound."""
    assert config.trainer.mixed_precision != "auto"
    return torch.bfloat16 if config.trainer.mixed_precision == "bf16" else torch.float32


def choose_device_type(config: Config) -> str:
    """`cuda` when there is a GPU and `trainer.use_cpu` does not forbid it, else `cpu`."""
    return "cuda" if torch.cuda.is_available() and not config.trainer.use_cpu else "cpu"


def is_installed(name: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


def check_runtime(config: Config) -> None:
    """Checks before any work that this machine can do what the config asks for.

    Raises:
        StartupError: one message with every problem, each with its key and remedy.
    """
    problems = []
    device_type = choose_device_type(config)
    if config.wandb.enabled and not is_installed("wandb"):
        problems.append(
            "wandb.enabled: true, but the package wandb is not installed; "
            "run `pip install -e '.[wandb]'` or set wandb.enabled: false"
        )
    if config.trainer.mixed_precision == "bf16" and device_type == "cuda" and not torch.cuda.is_bf16_supported():
        problems.append("trainer.mixed_precision: bf16, but this GPU has no bfloat16; set trainer.mixed_precision: no")
    needs_compiler = config.trainer.torch_compile and config.trainer.torch_compile_backend == "inductor"
    if needs_compiler and device_type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        problems.append(
            "trainer.torch_compile: true with torch_compile_backend: inductor needs a C++ compiler on a CPU and none "
            "is on the PATH; install g++ or set trainer.torch_compile: false"
        )
    try:
        choose_kernel(config.model.kernel_backend, device=torch.device(device_type))
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise StartupError("\n".join(problems))


def settle_determinism(deterministic: bool) -> None:
    """Has torch use operations that give the same bits every time, and raise where it has none; or allows all again.

    Call it before CUDA starts: cuBLAS reads its workspace setting once. The flash kernels' backward and the compiler
    follow the same switch. On a CPU every operation used here is deterministic anyway, so nothing becomes slower.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        # Filling fresh memory costs time and only hides reads of memory that nobody wrote.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic)


def _build_accelerator(device_type: str, mixed_precision: str) -> Accelerator:
    # The precision is state of the process, and an earlier start may have left another; the process group stays.
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=device_type == "cpu",
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=1,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )


def build_runtime(config: Config) -> Runtime:
    """Joins the process group that the launcher describes, or runs alone.

    Raises:
        StartupError: the launcher asked for several processes and they did not find each other.
    """
    settle_determinism(config.trainer.deterministic)
    if config.trainer.tf32 and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    # `auto` is bound when the process group is there, since all processes take one choice.
    precision = config.trainer.mixed_precision
    accelerator = _build_accelerator(choose_device_type(config), "no" if precision == "auto" else precision)
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        # Accelerate starts independent processes in silence under some launchers on a CPU.
        raise StartupError(
            f"the launcher started {expected} processes (WORLD_SIZE), but this one sees {accelerator.num_processes}; "
            "start with `torchrun --nproc_per_node N scripts/pretraining/pretrain.py CONFIG`"
        )
    several = accelerator.num_processes > 1
    return Runtime(
        accelerator=accelerator,
        # Accelerate numbers the CPU of each process ("cpu:0"), a device that torch.load does not know.
        device=accelerator.device if accelerator.device.type != "cpu" else torch.device("cpu"),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        host_group=dist.new_group(backend="gloo") if several else None,
        patient_group=dist.new_group(backend="gloo", timeout=PATIENCE) if several else None,
    )
