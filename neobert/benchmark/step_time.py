"""The training step alone: forward, backward, clipping, optimizer. Torch and numpy suffice for rows of random tokens.

    tokens/s        real tokens of the timed steps over their time, waiting for rows included
    MFU             tokens/s x FLOP per token / data-sheet peak of the device (bf16, dense), where that is known
    GEMM fraction   tokens/s x FLOP per token / rate of a large matrix product measured in this process
    data wait       fraction of the time that the step waited for its rows, where they come from a loader

FLOP per token: `Encoder.flops_per_token`, forward and backward, with the documents and masks of the rows themselves.
Lengths of made-up documents are log-normal, cut and packed by best fit, so rows are nearly full as in training.

Plain forms (masked attention, unfused AdamW) are here to measure what the others bring.
"""

import itertools
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from neobert.benchmark.settings import PRESETS, StepSettings
from neobert.benchmark.step_batches import SPECIALS, RowShape, made_up_policy, make_batches, make_documents
from neobert.config.schema import Config
from neobert.config.schema_optimizer import OptimizerSection
from neobert.config.schema_trainer import TrainerSection
from neobert.kernels.linear_cross_entropy import KERNELS, choose_kernel
from neobert.model.attention import AttentionBackend, choose_attention
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.fp8 import FP8_PRODUCTS, use_fp8
from neobert.model.peak import peak_flops
from neobert.model.segments import Segments
from neobert.objectives.base import Objective, ObjectiveModule
from neobert.objectives.table import OBJECTIVES
from neobert.optim.groups import build_parameter_groups
from neobert.optim.optimizers import build_optimizer
from neobert.train.hardware.device import choose_product_rows, find_missing_tools, resolve_precision
from neobert.train.master_weights import MasterWeights
from neobert.train.step import StepResult, train_step
from neobert.types import LossSum, PackedBatch


def _prepare(segments: Segments, window: int | None = None) -> Tensor:
    """bool `[B, 1, S, S]`: whether a query sees a key. Padding sees padding, so that no row is empty."""
    if window is not None:
        raise ValueError("model.local_attention: the masked attention of the benchmark has no window")
    return (segments.ids[:, :, None] == segments.ids[:, None, :])[:, None]


def _attend(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prepared: Any, *, scale: float) -> Tensor:
    rows, slots = prepared.shape[0], prepared.shape[-1]
    q, k, v = (x.reshape(rows, slots, *x.shape[1:]).transpose(1, 2) for x in (q_TND, k_TND, v_TND))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=prepared, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)


MASKED_ATTENTION = AttentionBackend(
    name="masked",
    kernel="one scaled_dot_product_attention with a mask",
    prepare=_prepare,
    attend=_attend,
)


class PlainAdamW(torch.optim.AdamW):
    """AdamW one tensor at a time. It never skips a step: a benchmark has none to skip."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None) -> Any:
        self.__dict__.pop("found_inf", None)  # torch takes the flag for a fused optimizer's.
        return super().step(closure)


def build_plain_adamw(module: torch.nn.Module, section: OptimizerSection) -> PlainAdamW:
    """The optimizer of the benchmark without its fused kernel."""
    groups = build_parameter_groups(module, section)
    return PlainAdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, foreach=False)


_GEMM_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTiming:
    """What came out."""

    tokens_per_second: float
    mfu: float | None
    gemm_fraction: float
    gemm_flops: float
    gemm: str
    """The product that has this rate."""

    precision: str
    """`bf16` or `fp32`."""

    precision_reason: str
    flops_per_token: float
    seconds_p50: float
    seconds_p95: float
    data_wait: float | None
    """None for made-up rows, which are ready before."""

    first_step_seconds: float
    compile_seconds: float | None
    """The first step less the median one; None without compilation."""

    peak_memory_bytes: int
    fill: float
    rows: str
    attention: str
    kernel: str
    device: str
    torch_version: str


class Autocast(nn.Module):
    """A module under autocast, as a run has it."""

    module: ObjectiveModule

    def __init__(self, module: ObjectiveModule, device: torch.device, enabled: bool) -> None:
        super().__init__()
        self.module, self._device, self._enabled = module, device, enabled

    def forward(self, batch: PackedBatch) -> LossSum:
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._enabled):
            loss: LossSum = self.module(batch)
        return loss


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowSource:
    """Batches without end, and the model that they are for."""

    model: ModelConfig
    batches: Iterator[PackedBatch]
    name: str
    objective: Objective = OBJECTIVES["mlm"]
    real: bool
    """Whether they come from a loader, which the step may have to wait for."""


def made_up_rows(settings: StepSettings) -> RowSource:
    """Random documents, equal for equal settings; eight batches in turns.

    Raises:
        ValueError: settings that no document fits.
    """
    for flag, value, least in (
        ("--length", settings.length, 3),
        ("--vocab-size", settings.vocab_size, SPECIALS + 1),
        ("--mean-document", settings.mean_document, 1),
    ):
        if value < least:
            raise ValueError(f"{flag}: {value}; write at least {least}")
    model = ModelConfig(
        **PRESETS[settings.preset],
        max_position_embeddings=settings.length,
        vocab_size=settings.vocab_size,
        pad_token_id=0,
        tie_word_embeddings=settings.tied,
    )
    count = min(8, settings.steps)
    documents = make_documents(
        2 * settings.rows * settings.length * (count + 1),
        mean=settings.mean_document,
        longest=settings.length,
        vocab_size=settings.vocab_size,
    )
    shape = RowShape(rows=settings.rows, length=settings.length, packed=not settings.padded)
    batches = make_batches(documents, shape, made_up_policy(settings.vocab_size, settings.probability))[:count]
    name = f"{settings.rows} rows of {settings.length}, made up"
    return RowSource(model=model, batches=itertools.cycle(batches), name=name, real=False)


def build_stepper(settings: StepSettings) -> Callable[[], PackedBatch]:
    """Makes a training step on the next made-up rows at every call, and returns the rows."""
    device, source = torch.device(settings.device), made_up_rows(settings)
    settings, _ = bind_precision(settings, source.model)
    model, _, _ = build_model(settings, source.model, device, product_dtype(settings))
    optimizer = build_step_optimizer(model, settings)

    def step() -> PackedBatch:
        batch = next(source.batches)
        make_step(model, optimizer, batch.to(device, non_blocking=True))
        return batch

    return step


def make_step(model: nn.Module, optimizer: Optimizer, batch: PackedBatch) -> StepResult:
    """A training step on rows that are on the device."""
    scale = 1 / max(batch.num_targets, 1)
    return train_step(model, optimizer, [batch], lr=1e-4, scale=scale, gradient_clipping=1.0)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def product_dtype(settings: StepSettings) -> torch.dtype:
    """Of the matrix products; `bind_precision` has replaced `auto`."""
    return DTYPES[settings.precision]


def bind_precision(settings: StepSettings, model: ModelConfig) -> tuple[StepSettings, str]:
    """The settings with `bf16` or `fp32`, and why it is that one for this model."""
    if settings.precision == "auto" and (settings.bf16_residual or settings.fp8 != "no"):
        return replace(settings, precision="bf16"), "--bf16-residual and --fp8 are forms of it"
    sizes = model.hidden_size, model.intermediate_size
    precision, reason = resolve_precision(settings.precision, torch.device(settings.device).type, *sizes)
    return replace(settings, precision=precision), reason


def measure_step(settings: StepSettings, source: RowSource | None = None) -> StepTiming:
    """Builds the model, makes the steps, measures.

    Raises:
        ValueError: an attention backend or a kernel that cannot run on the device.
    """
    source = made_up_rows(settings) if source is None else source
    settings, reason = bind_precision(settings, source.model)
    device, dtype = torch.device(settings.device), product_dtype(settings)
    model, attention, kernel = build_model(settings, source.model, device, dtype, source.objective)
    optimizer = build_step_optimizer(model, settings)
    # Threads of a loader count in the time of the process.
    clock = time.perf_counter if source.real else choose_clock(device)
    seconds, waits, timed, started = [], [], [], time.perf_counter()
    for number in range(settings.warmup + settings.steps):
        start = clock()
        batch = next(source.batches)
        waits.append(clock() - start)
        make_step(model, optimizer, batch.to(device, non_blocking=True))
        wait_for(device)
        seconds.append(clock() - start)
        if number == 0:
            first = time.perf_counter() - started
        if number >= settings.warmup:
            timed.append(batch)
    seconds, waits = seconds[settings.warmup :], waits[settings.warmup :]
    real = sum(b.num_tokens for b in timed)
    flops = model.module.encoder.flops_per_token(
        attended_length=sum(b.attended_tokens for b in timed) / real,
        predicted_fraction=sum(b.num_targets for b in timed) / real if source.objective.predicts_tokens else 0.0,
    )
    rate, peak = real / sum(seconds), peak_flops(device, dtype)
    gemm, product = measure_gemm(device, dtype, clock)
    median = float(np.percentile(seconds, 50))
    return StepTiming(
        tokens_per_second=rate,
        mfu=None if peak is None else rate * flops / peak,
        gemm_fraction=rate * flops / gemm,
        gemm_flops=gemm,
        gemm=product,
        precision=settings.precision,
        precision_reason=reason,
        flops_per_token=flops,
        seconds_p50=median,
        seconds_p95=float(np.percentile(seconds, 95)),
        data_wait=sum(waits) / sum(seconds) if source.real else None,
        first_step_seconds=first,
        compile_seconds=first - median if settings.compile else None,
        peak_memory_bytes=peak_memory_bytes(device),
        fill=real / sum(b.input_ids.numel() for b in timed),
        rows=source.name,
        attention=attention,
        kernel=kernel,
        device=_describe_device(device) + ("" if clock is time.perf_counter else ", CPU time"),
        torch_version=torch.__version__,
    )


def build_step_optimizer(model: nn.Module, settings: StepSettings) -> Optimizer:
    """The optimizer that the settings ask for."""
    section = OptimizerSection(lr=1e-4)
    return build_plain_adamw(model, section) if settings.plain_adamw else build_optimizer(model, section)


def build_model(
    settings: StepSettings,
    architecture: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    objective: Objective = OBJECTIVES["mlm"],
) -> tuple[Autocast | MasterWeights, str, str]:
    """The model, and the names of its attention and of its loss kernel."""
    attention = MASKED_ATTENTION
    if settings.attention != MASKED_ATTENTION.name:
        attention = choose_attention(settings.attention, device=device, dtype=dtype, head_dim=architecture.head_dim)
    kernel = choose_kernel(settings.kernel, device=device)
    asks = settings.compile or kernel in ("triton", "liger") or attention.name == "flex"
    missing = find_missing_tools() if device.type == "cuda" and asks else None
    if missing is not None:
        raise ValueError(
            f"--device cuda: compiling for this GPU needs {missing}; or use --kernel torch without --compile"
        )
    torch.manual_seed(0)
    encoder = Encoder(
        architecture,
        attention,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_every=settings.checkpointing_every,
    )
    config = Config(trainer=TrainerSection(masked_logits_only_loss=not settings.all_positions))
    if settings.fp8 != "no":
        use_fp8(encoder, FP8_PRODUCTS[settings.fp8])
    module = objective.build_module(encoder, config, KERNELS[kernel]).to(device)
    model: Autocast | MasterWeights = Autocast(module, device, settings.precision == "bf16")
    if settings.bf16_residual:
        model = MasterWeights(module)
        encoder = model.computing.encoder
    if settings.compile:
        for block in encoder.layers:
            block.compile(backend=settings.compile_backend)
    return model, attention.name, kernel


def choose_clock(device: torch.device) -> Callable[[], float]:
    """The time of the process where one CPU thread does all the work, which other work on the machine hardly lengthens;
    else the clock's."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time
    return time.perf_counter


def measure_gemm(
    device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter, repeats: int = 10
) -> tuple[float, str]:
    """FLOP/s of a square matrix product, the best of some, and its sizes: fewer rows where a CPU takes long."""
    size = _GEMM_SIZE[device.type]
    rows = choose_product_rows(size, size, size, dtype) if device.type == "cpu" else size
    a, b = (torch.randn(count, size, device=device, dtype=dtype) for count in (rows, size))
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        out: Tensor = a @ b
        wait_for(device)
        best = min(best, clock() - start)
        del out
    return 2 * rows * size**2 / best, f"{rows:,} x {size:,} x {size:,}"


def describe(settings: StepSettings, timing: StepTiming) -> str:
    """The result as a table."""
    utilisation = "no data-sheet peak is known"
    if timing.mfu is not None:
        peak = timing.tokens_per_second * timing.flops_per_token / timing.mfu
        utilisation = f"{timing.mfu:.1%} = tokens/s x FLOP per token / {peak / 1e12:,.0f} TFLOP/s"
    wait = "rows are made up" if timing.data_wait is None else f"{timing.data_wait:.2%} of the time"
    compiled = "" if timing.compile_seconds is None else f", of which compilation {timing.compile_seconds:,.2f} s"
    rows = {
        "settings": ", ".join(f"{name} {value}" for name, value in asdict(settings).items()),
        "precision": f"{timing.precision}, {timing.precision_reason}",
        "machine": f"{timing.device}, torch {timing.torch_version}",
        "rows": timing.rows,
        "attention, loss kernel": f"{timing.attention}, {timing.kernel}",
        "tokens/s": f"{timing.tokens_per_second:,.0f} real ({timing.fill:.1%} of the slots)",
        "MFU": utilisation,
        "GEMM fraction": f"{timing.gemm_fraction:.1%} of {timing.gemm_flops / 1e9:,.0f} GFLOP/s, of {timing.gemm} here",
        "FLOP per token": f"{timing.flops_per_token / 1e6:,.1f} M",
        "step": f"p50 {timing.seconds_p50 * 1e3:,.1f} ms, p95 {timing.seconds_p95 * 1e3:,.1f} ms",
        "data wait": wait,
        "first step": f"{timing.first_step_seconds:,.2f} s{compiled}",
        "peak memory": f"{timing.peak_memory_bytes / 1e9:,.2f} GB",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def wait_for(device: torch.device) -> None:
    """Until the device has done what is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Of the device's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
