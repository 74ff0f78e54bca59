"""The training step alone: rows of random tokens, forward, backward, clipping, optimizer. Torch and numpy suffice.

    tokens/s        real tokens of the timed steps over their time
    MFU             tokens/s x FLOP per token / data-sheet peak of the device (bf16, dense), where that is known
    GEMM fraction   tokens/s x FLOP per token / rate of a large matrix product measured in this process

FLOP per token: `Encoder.flops_per_token`, forward and backward, with the documents and masks of the rows themselves.
Document lengths are log-normal, cut and packed by best fit, so rows are nearly full as in training.
"""

import resource
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neobert.data.collate import Collator
from neobert.data.packing import best_fit, max_segments_per_row
from neobert.kernels.linear_cross_entropy import KERNELS, choose_kernel
from neobert.model.attention import choose_attention
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.peak import peak_flops
from neobert.objectives.mlm import MaskedLM, MaskPolicy
from neobert.optim.optimizers import build_optimizer
from neobert.train.allocator import keep_freed_memory
from neobert.train.step import train_step
from neobert.types import LossSum, PackedBatch, PackedRow

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    "small": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1056},
    "neobert": {"hidden_size": 768, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 3072},
}
"""Shapes by name; `neobert` is that of the paper, `small` the one of docs/performance.md."""

_SPECIALS = 5
_GEMM_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings:
    """What is measured."""

    preset: str = "small"
    vocab_size: int = 30592
    tied: bool = False
    length: int = 512
    rows: int = 8
    mean_document: float = 250.0
    """Of the log-normal distribution, in tokens."""

    probability: float = 0.2
    precision: str = "bf16"
    attention: str = "auto"
    kernel: str = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    steps: int = 20
    warmup: int = 5
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFigures:
    """What came out."""

    tokens_per_second: float
    mfu: float | None
    gemm_fraction: float
    gemm_flops: float
    flops_per_token: float
    seconds_p50: float
    seconds_p95: float
    first_step_seconds: float
    """Compilation included."""

    peak_memory_bytes: int
    fill: float
    attention: str
    kernel: str
    device: str
    torch_version: str


class Autocast(nn.Module):
    """A module under autocast, as a run has it."""

    def __init__(self, module: MaskedLM, device: torch.device, enabled: bool) -> None:
        super().__init__()
        self.module, self._device, self._enabled = module, device, enabled

    def forward(self, batch: PackedBatch) -> LossSum:
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._enabled):
            loss: LossSum = self.module(batch)
        return loss


def make_batches(settings: StepSettings, count: int) -> list[PackedBatch]:
    """Packed batches of random documents, equal for equal settings."""
    rng = np.random.default_rng(0)
    needed = 2 * settings.rows * settings.length * (count + 1)
    lengths = np.exp(rng.normal(np.log(settings.mean_document) - 0.5, 1.0, size=4 + needed // 8)).astype(int)
    lengths = np.clip(lengths, 8, settings.length - 2)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), needed)) + 1]
    most = max_segments_per_row(settings.length, packed=True)
    plan = best_fit((lengths + 2).tolist(), settings.length, most)
    order = rng.permutation(len(plan))[: settings.rows * count]
    policy = MaskPolicy(
        probability=settings.probability,
        mask_all=False,
        mask_token_id=4,
        special_ids=tuple(range(_SPECIALS)),
        random_ids=np.arange(_SPECIALS, settings.vocab_size, dtype=np.int32),
    )
    collate = Collator(policy=policy, seed=0, draw="row", max_seq_length=settings.length, max_segments=most, pad_id=0)
    rows = [_make_row([int(lengths[i]) for i in plan[n]], key, settings, rng) for key, n in enumerate(order)]
    return [collate(rows[at : at + settings.rows]) for at in range(0, settings.rows * count, settings.rows)]


def _make_row(lengths: list[int], key: int, settings: StepSettings, rng: np.random.Generator) -> PackedRow:
    parts = [np.concatenate([[2], rng.integers(_SPECIALS, settings.vocab_size, n), [3]]) for n in lengths]
    count = len(lengths)
    return PackedRow(
        tokens=np.concatenate(parts).astype(np.int32),
        lengths=tuple(n + 2 for n in lengths),
        documents=(0,) * count,
        offsets=(0,) * count,
        sources=(0,) * count,
        key=key,
    )


def measure_step(settings: StepSettings) -> StepFigures:
    """Builds the model, makes the steps, measures.

    Raises:
        ValueError: an attention backend or a kernel that cannot run on the device.
    """
    device = torch.device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    model, attention, kernel = _build_model(settings, device, dtype)
    encoder = model.module.encoder
    optimizer = build_optimizer(model, name="adamw", lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    batches = make_batches(settings, min(8, settings.steps))
    seconds, tokens = [], 0
    for number in range(settings.warmup + settings.steps):
        batch = batches[number % len(batches)]
        start = time.perf_counter()
        train_step(
            model,
            optimizer,
            [batch.to(device, non_blocking=True)],
            lr=1e-4,
            scale=1 / batch.num_targets,
            gradient_clipping=1.0,
        )
        _wait(device)
        seconds.append(time.perf_counter() - start)
        tokens += batch.num_tokens if number >= settings.warmup else 0
    timed = seconds[settings.warmup :]
    real = sum(b.num_tokens for b in batches)
    flops = encoder.flops_per_token(
        attended_length=sum(b.attended_tokens for b in batches) / real,
        predicted_fraction=sum(b.num_targets for b in batches) / real,
    )
    rate, gemm, peak = tokens / sum(timed), measure_gemm(device, dtype), peak_flops(device)
    return StepFigures(
        tokens_per_second=rate,
        mfu=None if peak is None else rate * flops / peak,
        gemm_fraction=rate * flops / gemm,
        gemm_flops=gemm,
        flops_per_token=flops,
        seconds_p50=float(np.percentile(timed, 50)),
        seconds_p95=float(np.percentile(timed, 95)),
        first_step_seconds=seconds[0],
        peak_memory_bytes=_peak_memory(device),
        fill=real / sum(b.input_ids.numel() for b in batches),
        attention=attention,
        kernel=kernel,
        device=_describe_device(device),
        torch_version=torch.__version__,
    )


def _build_model(settings: StepSettings, device: torch.device, dtype: torch.dtype) -> tuple[Autocast, str, str]:
    """The model, and the names of its attention and of its loss kernel."""
    config = ModelConfig(
        **PRESETS[settings.preset],
        max_position_embeddings=settings.length,
        vocab_size=settings.vocab_size,
        pad_token_id=0,
        tie_word_embeddings=settings.tied,
    )
    attention = choose_attention(settings.attention, device=device, dtype=dtype, head_dim=config.head_dim)
    kernel = choose_kernel(settings.kernel, device=device)
    torch.manual_seed(0)
    encoder = Encoder(config, attention, gradient_checkpointing=settings.gradient_checkpointing)
    model = Autocast(MaskedLM(encoder, kernel=KERNELS[kernel]).to(device), device, settings.precision == "bf16")
    if settings.compile:
        for block in encoder.layers:
            block.compile()
    return model, attention.name, kernel


def measure_gemm(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> float:
    """FLOP/s of a square matrix product, the best of some."""
    size = _GEMM_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        out: Tensor = a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
        del out
    return 2 * size**3 / best


def describe(settings: StepSettings, figures: StepFigures) -> str:
    """The result as a table."""
    utilisation = "no data-sheet peak is known" if figures.mfu is None else f"{figures.mfu:.1%}"
    rows = {
        "settings": ", ".join(f"{name} {value}" for name, value in asdict(settings).items()),
        "machine": f"{figures.device}, torch {figures.torch_version}",
        "attention, loss kernel": f"{figures.attention}, {figures.kernel}",
        "tokens/s": f"{figures.tokens_per_second:,.0f} real ({figures.fill:.1%} of the slots)",
        "MFU": utilisation,
        "GEMM fraction": f"{figures.gemm_fraction:.1%} of {figures.gemm_flops / 1e9:,.0f} GFLOP/s measured here",
        "FLOP per token": f"{figures.flops_per_token / 1e6:,.1f} M",
        "step": f"p50 {figures.seconds_p50 * 1e3:,.1f} ms, p95 {figures.seconds_p95 * 1e3:,.1f} ms",
        "first step": f"{figures.first_step_seconds:,.2f} s",
        "peak memory": f"{figures.peak_memory_bytes / 1e9:,.2f} GB",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
