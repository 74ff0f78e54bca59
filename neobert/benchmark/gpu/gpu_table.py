"""What `gpu_check` runs, what it expects, and what a check receives and returns."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_STACK = ("accelerate", "omegaconf", "tokenizers", "datasets")
"""Packages of a training run, beyond torch and numpy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuCheck:
    """One line of the table."""

    runs: str
    expects: str
    minutes: float
    """Estimated, on an H200: no check was run on a GPU when this was written."""

    function: str
    """`module:name` in `neobert.benchmark.gpu`, called with a `Bench`."""

    packages: tuple[str, ...] = ()
    gpus: int = 1


CHECKS: dict[str, GpuCheck] = {
    "machine": GpuCheck(
        runs="compiler, Python.h, driver, versions; a first launch of the Triton loss kernel",
        expects="a C compiler, Python.h, a driver as new as torch's CUDA, and the launch works",
        minutes=0.3,
        function="gpu_kernels:check_machine",
    ),
    "step-compiled": GpuCheck(
        runs="the training step of 28 x 768 at 8, 32 and 64 rows of 1,024, bf16, compiled blocks",
        expects="64 rows: 280,000 real tokens/s, MFU 38%; no less at 32 rows than 90% of it",
        minutes=1.6,
        function="gpu_steps:check_compiled_step",
    ),
    "borders": GpuCheck(
        runs="attention of a layer with the real segment borders, and with borders filled up to rows x (L // 8 + 1)",
        expects="filled-up borders cost 110 to 200 ms more over 28 layers at 64 x 1,024, and 3 GB",
        minutes=0.4,
        function="gpu_kernels:check_borders",
    ),
    "where": GpuCheck(
        runs="three profiled steps at 64 rows, compiled and eager: device time by kind of kernel",
        expects="products about 60% of a compiled step, idle under 5%",
        minutes=1.2,
        function="gpu_steps:check_where_time_goes",
    ),
    "run": GpuCheck(
        runs="the quickstart, 120 steps, compiled, with evaluations, saves and a resume; its model is used",
        expects="it finishes, the loss falls, the resumed run continues, the saved model answers",
        minutes=0.9,
        function="gpu_runs:check_run",
        packages=_STACK,
    ),
    "equality": GpuCheck(
        runs="two runs and a resume with trainer.deterministic and compiled blocks",
        expects="losses, gradient norms and weights equal to the last bit",
        minutes=1.0,
        function="gpu_runs:check_equality",
        packages=_STACK,
    ),
    "gpu-tests": GpuCheck(
        runs="pytest -m gpu",
        expects="all pass",
        minutes=1.2,
        function="gpu_runs:check_gpu_tests",
        packages=("pytest", *_STACK),
    ),
    "precision-keys": GpuCheck(
        runs="trainer.bf16_residual, trainer.fp8: rowwise and both: ten losses beside bf16's, speed at 8 and 64 rows, "
        "compiled; the product of the GPU beside its emulation",
        expects="losses within 1%; at 64 rows bf16_residual 4 to 6% faster than bf16, fp8 20%, both 25%; the product "
        "within 1% of its emulation",
        minutes=2.5,
        function="gpu_steps:check_precision_keys",
    ),
    "step-eager": GpuCheck(
        runs="the training step at 8, 32 and 64 rows, eager",
        expects="64 rows: 216,000 real tokens/s, MFU 29%",
        minutes=0.6,
        function="gpu_steps:check_eager_step",
    ),
    "attention": GpuCheck(
        runs="every attention backend; torch's own kernel, and flash-attn 3 by torch where both can: time, distance to "
        "the definition",
        expects="flash_attn_varlen is the fastest that runs, with flash-attn 3 on Hopper; all within 2e-2 of the "
        "definition in bf16",
        minutes=0.6,
        function="gpu_kernels:check_attention",
    ),
    "gemm": GpuCheck(
        runs="the products of a layer at 65,536 tokens, forward and backward: bf16, and fp8 by rows where it exists",
        expects="bf16 600 to 700 TFLOP/s (110 to 130 ms in 28 layers), fp8 1.5 to 1.8 times as fast",
        minutes=0.3,
        function="gpu_kernels:check_products",
    ),
    "loss": GpuCheck(
        runs="loss kernels torch, triton, liger and the reference at 13,312 x 768 x 30,592, and their gradients",
        expects="5 to 7 ms a step for triton; gradients within 1% of the definition",
        minutes=0.4,
        function="gpu_kernels:check_loss",
    ),
    "recompiles": GpuCheck(
        runs="compiled steps on eight batches of different documents, graphs counted",
        expects="no graph after the first step",
        minutes=0.5,
        function="gpu_steps:check_recompiles",
    ),
    "micro-batch": GpuCheck(
        runs="trainer.per_device_train_batch_size: auto with 28 x 768 at 1,024, up to the end of the memory",
        expects="it ends with a number of rows and the run trains with it",
        minutes=1.2,
        function="gpu_runs:check_micro_batch",
        packages=_STACK,
    ),
    "profiler": GpuCheck(
        runs="trainer.profiler_steps in a run, and neobert analyze-profile on its trace",
        expects="a trace of the device whose times add up, and products, attention, loss and optimizer in it",
        minutes=0.5,
        function="gpu_runs:check_profiler",
        packages=_STACK,
    ),
    "inference": GpuCheck(
        runs="hidden states of 512 documents, 28 x 768: fp32, fp32 with TF32, bf16",
        expects="bf16 5 to 10 times as fast as fp32, vectors at a cosine above 0.99",
        minutes=0.5,
        function="gpu_steps:check_inference",
    ),
    "optimizers": GpuCheck(
        runs="a step of every optimizer on one gradient of 28 x 768",
        expects="adamw under 3% of a step, Muon under 15%",
        minutes=0.5,
        function="gpu_steps:check_optimizers",
    ),
    "checkpointing": GpuCheck(
        runs="memory and speed with gradient checkpointing at 128 and 256 rows, compiled",
        expects="256 rows fit in 80 GB; three quarters of the speed without",
        minutes=1.0,
        function="gpu_steps:check_checkpointing",
    ),
    "muonclip": GpuCheck(
        runs="muonclip with skipped spikes, averaged weights and statistics, compiled",
        expects="it finishes, losses are finite, the average loads",
        minutes=0.7,
        function="gpu_runs:check_muonclip",
        packages=_STACK,
    ),
    "two-gpus": GpuCheck(
        runs="a run of one process resumed by two, with gradient accumulation and compiled blocks: with "
        "DistributedDataParallel, and with trainer.bf16_residual",
        expects="the losses of one process within 1%; each process has a context on one GPU, its own",
        minutes=2.5,
        function="gpu_runs:check_two_gpus",
        packages=_STACK,
        gpus=2,
    ),
    "trainer-tests": GpuCheck(
        runs="NEOBERT_TEST_DEVICE=cuda pytest tests/train",
        expects="all pass",
        minutes=4.0,
        function="gpu_runs:check_trainer_tests",
        packages=("pytest", *_STACK),
    ),
}
"""In the order of their worth: what does not fit into the minutes is at the end."""


class CannotRun(Exception):
    """A check has nothing to run on here; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What a check runs on."""

    device: str
    """`cuda` or `cpu`."""

    folder: Path
    """For its files; gone after the check."""

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    def size(self, full: Any, tiny: Any) -> Any:
        """What is for a GPU, or for a dry run."""
        return tiny if self.dry else full


@dataclass(kw_only=True, slots=True)
class Found:
    """What a check saw."""

    lines: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, text: str, /, **values: Any) -> None:
        """One line, and the numbers in it."""
        self.lines.append(f"{name}: {text}")
        self.values[name] = values


class NotAsExpected(Exception):
    """A check ran and what came out is wrong; `found` is what came out."""

    def __init__(self, problem: str, found: Found | None = None) -> None:
        super().__init__(problem)
        self.found = found or Found()
