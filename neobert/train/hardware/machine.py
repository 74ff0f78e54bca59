"""Where a run executes: device, precision, process group, and whether the machine can do what the config asks for.

Accelerate joins the process group and brings device placement, autocast and DistributedDataParallel; what a launcher
asks for is read in `launcher`, what shards a model is in `parallel`. The loader, the schedule, gradient accumulation
and checkpoints are ours, so `Accelerator` prepares the model and nothing else: its loader would split batches that are
split already, its scheduler steps once for each process, and its checkpoints know no order of rows.

The precision that `auto` means (see `device`) is part of what makes a run exact: it is one for all ranks, the run's
config holds it, and a run that continues from a checkpoint keeps the checkpoint's.
"""

import importlib.util
import resource
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.host import describe_waiting
from neobert.kernels.linear_cross_entropy import choose_kernel
from neobert.key import show_value
from neobert.model.fp8 import fp8_problem
from neobert.train.hardware.device import (
    choose_device_type,
    choose_precision,
    find_device_problems,
    find_slow_bf16,
    find_tool_problems,
    set_determinism,
    use_expandable_segments,
)
from neobert.train.master_weights import MasterWeights
from neobert.train.processes.agreement import exchange
from neobert.train.processes.heartbeat import PATIENCE, Heartbeat, build_heartbeat, check_launcher, choose_group_timeout
from neobert.train.processes.launcher import check_world

T = TypeVar("T")


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
    """The same for the start, in which rank 0 may prepare data for hours."""

    heartbeat: Heartbeat | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def describe_device(self) -> str:
        """The device, and on a CPU how many threads compute and how they wait for each other."""
        if self.device.type == "cuda":
            return f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        if self.device.type != "cpu":
            return str(self.device)
        count = torch.get_num_threads()
        return f"cpu ({count} thread{'s' if count > 1 else ''}, {describe_waiting()})"

    def with_precision(self, mixed_precision: str) -> Self:
        """This runtime, computing in another precision: `no` or `bf16`. Call it before `prepare_model`."""
        return replace(self, accelerator=_build_accelerator(self.device.type, mixed_precision))

    def prepare_model(self, module: nn.Module) -> nn.Module:
        """`module` on the device, under autocast, and wrapped by DistributedDataParallel in several processes.

        What keeps master weights computes without autocast and leaves its gradients to `average_on_device`; here all
        ranks get the weights of rank 0, as DistributedDataParallel has it.
        """
        if not isinstance(module, MasterWeights):
            return self.accelerator.prepare_model(module)
        for weight in module.state_dict().values():
            weight.copy_(self.from_main(weight))
        return module

    def at(self, where: str, *, patient: bool = False) -> None:
        """What this process does from here on; `patient`: others wait for it for as long as it lives."""
        if self.heartbeat is not None:
            self.heartbeat.at(where, patient=patient)

    def _arrive(self) -> None:
        if self.heartbeat is not None:
            self.heartbeat.arrive()

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Leaves gradients unreduced: for every micro-batch of a step but the last."""
        return self.accelerator.no_sync(model) if self.world > 1 else nullcontext()

    def sum_on_host(self, values: Sequence[int], *, patient: bool = False) -> list[int]:
        """Sums integers over all ranks without touching the device. `patient`: waits for hours if need be."""
        if self.world == 1:
            return list(values)
        self._arrive()
        totals = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(totals, group=self.patient_group if patient else self.host_group)
        return totals.tolist()

    def sum_on_device(self, values: Tensor) -> Tensor:
        """Sums a tensor over all ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def average_on_device(self, tensors: Sequence[Tensor]) -> None:
        """Makes each tensor its mean over all ranks, in place."""
        if self.world > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()
            torch._foreach_div_(list(tensors), self.world)

    def max_on_device(self, values: Tensor) -> Tensor:
        """The elementwise maximum of a tensor over all ranks."""
        if self.world > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def gather_objects(self, value: Any, *, patient: bool = False) -> list[Any]:
        """Every rank's picklable value, in rank order, on every rank. `patient`: waits for hours if need be."""
        if self.world == 1:
            return [value]
        self._arrive()
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value, group=self.patient_group if patient else self.host_group)
        return gathered

    def gather_to_main(self, value: Any, *, patient: bool = False) -> list[Any] | None:
        """Every rank's picklable value, in rank order, on rank 0; None on the others."""
        if self.world == 1:
            return [value]
        self._arrive()
        gathered: list[Any] | None = [None] * self.world if self.is_main else None
        dist.gather_object(value, gathered, dst=0, group=self.patient_group if patient else self.host_group)
        return gathered

    def object_from_main(self, value: T, *, patient: bool = False) -> T:
        """Rank 0's picklable value, on every rank."""
        if self.world == 1:
            return value
        self._arrive()
        found = [value]
        dist.broadcast_object_list(found, src=0, group=self.patient_group if patient else self.host_group)
        return found[0]

    def from_main(self, values: Tensor) -> Tensor:
        """Rank 0's values of a tensor, on every rank; the argument stays as it is."""
        copy = values.detach().clone(memory_format=torch.contiguous_format)
        if self.world > 1:
            dist.broadcast(copy, src=0, group=self.host_group if copy.device.type == "cpu" else None)
        return copy

    def peak_memory_bytes(self) -> int:
        """Highest memory in use so far: of the device's allocator on a GPU, of the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def close(self) -> None:
        """Leaves the process group and forgets this run's precision, so that another run can start here. Collective."""
        if self.heartbeat is not None:
            self.sum_on_host([0])  # Rank 0 may keep the store.
            self.heartbeat.close()
        self.accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


def compute_dtype(config: Config) -> torch.dtype:
    """Type of the matrix products; `trainer.mixed_precision` must be bound."""
    assert config.trainer.mixed_precision != "auto"
    return torch.bfloat16 if config.trainer.mixed_precision == "bf16" else torch.float32


def describe_precision(config: Config) -> str:
    """For the log."""
    name = config.trainer.mixed_precision.replace("no", "fp32")
    name += ", residual stream too" if config.trainer.bf16_residual else ""
    return name if config.trainer.fp8 == "no" else f"{name}, fp8 products ({config.trainer.fp8})"


def describe_compute(config: Config, runtime: Runtime, *parts: str) -> str:
    """The line of a run's start about what computes: `parts` are what the objective says, such as the attention."""
    compiled = "compiled" if choose_compile(config) else "not compiled"
    said = [runtime.describe_device(), describe_precision(config), *parts, compiled, f"{runtime.world} process(es)"]
    return f"compute   {', '.join(said)}"


def choose_compile(config: Config) -> bool:
    """Whether blocks are compiled: `trainer.torch_compile`, and null on a GPU, where no batch has another shape."""
    if config.trainer.torch_compile is not None:
        return config.trainer.torch_compile
    one_shape = config.task == "pretraining" or bool(config.trainer.torch_compile_dynamic)
    return choose_device_type(config) == "cuda" and one_shape


def is_installed(name: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


def _find_missing_trackers(config: Config) -> list[str]:
    asked = config.trainer.report_to
    return [
        f"{'wandb.enabled: true' if asked is None else f'trainer.report_to: {show_value(asked)}'}, but the package "
        f"{name} is not installed; run `pip install -e '.[{name}]'` or "
        + ("set wandb.enabled: false" if asked is None else f"leave {name} out")
        for name in config.requested_trackers
        if name != "all" and not is_installed(name)
    ]


def check_runtime(config: Config) -> None:
    """Checks before any work that this machine can do what the config asks for.

    Raises:
        StartupError: one message with every problem, each with its key and remedy.
    """
    problems = _find_missing_trackers(config)
    device_type = choose_device_type(config)
    needs_bf16 = config.trainer.mixed_precision == "bf16" and device_type == "cuda"
    if device_problems := find_device_problems(config, device_type):
        problems += device_problems
    elif needs_bf16 and not torch.cuda.is_bf16_supported():
        problems.append("trainer.mixed_precision: bf16, but this GPU has no bfloat16; set trainer.mixed_precision: no")
    kernel = None
    try:
        kernel = choose_kernel(config.model.kernel_backend, device=torch.device(device_type))
    except ValueError as error:
        problems.append(str(error))
    if config.trainer.fp8 == "rowwise" and (problem := fp8_problem(torch.device(device_type))) is not None:
        problems.append(
            f"trainer.fp8: rowwise {problem}; write no, or emulated to see what its rounding does to a loss"
        )
    inductor = choose_compile(config) and config.trainer.torch_compile_backend == "inductor"
    problems += find_tool_problems(config, device_type, inductor=inductor, kernel=kernel)
    if problems:
        raise StartupError("\n".join(problems))


def _build_accelerator(device_type: str, mixed_precision: str, timeout: float | None = None) -> Accelerator:
    # The precision is state of the process, and an earlier start may have left another; the process group stays.
    AcceleratorState._reset_state()
    parallel = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Accelerator(
        cpu=device_type == "cpu",
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=1,
        kwargs_handlers=[parallel, InitProcessGroupKwargs(timeout=choose_group_timeout(timeout))],
    )


def build_runtime(config: Config) -> Runtime:
    """Joins the process group that the launcher describes, or runs alone. It computes in float32; see `with_precision`.

    Raises:
        StartupError: the launcher asked for several processes and they did not find each other.
        RankLostError: the launcher was killed.
    """
    check_launcher()
    set_determinism(config.trainer.deterministic)
    if config.trainer.cpu_threads is not None:
        torch.set_num_threads(config.trainer.cpu_threads)
    if choose_device_type(config) == "cuda":
        use_expandable_segments()
    if config.trainer.tf32 and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    # The precision is bound when the process group is there, since all processes take one choice.
    accelerator = _build_accelerator(choose_device_type(config), "no", config.trainer.rank_timeout_seconds)
    check_world(accelerator.num_processes)
    several, timeout = accelerator.num_processes > 1, config.trainer.rank_timeout_seconds
    heartbeat = build_heartbeat(accelerator.process_index, accelerator.num_processes, timeout)
    runtime = Runtime(
        accelerator=accelerator,
        # Accelerate numbers the CPU of each process ("cpu:0"), a device that torch.load does not know.
        device=accelerator.device if accelerator.device.type != "cpu" else torch.device("cpu"),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        host_group=dist.new_group(backend="gloo", timeout=choose_group_timeout(timeout)) if several else None,
        patient_group=dist.new_group(backend="gloo", timeout=PATIENCE) if several else None,
        heartbeat=heartbeat,
    )
    if heartbeat is not None:
        heartbeat.start()
    return runtime


def bind_precision(config: Config, checkpoint_config: Config | None, runtime: Runtime) -> tuple[Config, list[str]]:
    """The config with a precision instead of `auto`, and what to say about it; collective.

    Raises:
        StartupError: the checkpoint's precision is bf16, and this GPU does not have it.
    """
    if config.trainer.mixed_precision != "auto":
        # A checkpoint keeps its precision, and bf16_residual is a form of bf16.
        is_choice = checkpoint_config is None and not config.trainer.bf16_residual
        on_cpu = runtime.device.type == "cpu" and runtime.is_main
        asked = is_choice and on_cpu and config.trainer.mixed_precision == "bf16"
        problem = find_slow_bf16(config) if asked else None
        return config, [problem] if problem is not None else []
    if checkpoint_config is None:
        # Every GPU is asked, and one `no` is enough; on a CPU rank 0 measures.
        asked = runtime.is_main or choose_device_type(config) == "cuda"
        answers: list[Any] = exchange(runtime, choose_precision(config) if asked else None)
        precision, reason = max(answer for answer in answers if answer is not None)  # `no` is more than `bf16`.
    else:
        precision, reason = checkpoint_config.trainer.mixed_precision, "the checkpoint's"
        if precision == "bf16" and runtime.device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise StartupError(
                "trainer.mixed_precision: auto keeps the checkpoint's bf16, but this GPU has no bfloat16; "
                "write trainer.mixed_precision: no to continue in float32"
            )
    bound = replace(config, trainer=replace(config.trainer, mixed_precision=precision))
    return bound, [f"trainer.mixed_precision: auto is {precision}: {reason}"]
