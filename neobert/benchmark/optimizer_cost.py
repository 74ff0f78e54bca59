"""What optimizers cost, and how orthogonal their updates are. Torch and numpy suffice.

Time: one model, one gradient a round; every optimizer makes its step on it in turn, so that all see the same machine. A
fraction is the optimizer's time over that of forward, backward, clipping and the optimizer. Measuring attention logits
is the forward and backward pass of a step that does, less that of a step that does not, over the interval.

Orthogonality: the factor O of a matrix G = U S V^T against the SVD in double precision: the largest deviation of a
singular value of O from 1, and the distance to U V^T over its Frobenius norm. Three kinds of matrices: `wide` Gaussian
ones, `square` Gaussian ones, which have a few singular values near 0, and `decaying` ones, square, whose singular
values fall evenly on a logarithmic scale from 1 to 0.001.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from neobert.benchmark.settings import StepSettings
from neobert.benchmark.step_time import bind_precision, build_model, made_up_rows, product_dtype
from neobert.config.schema_optimizer import MuonSection, OptimizerSection
from neobert.optim.optimizers import OPTIMIZERS, build_optimizer, step_unless
from neobert.optim.orthogonal import ORTHOGONALIZATIONS, orthogonalize
from neobert.optim.qk_clip import QKClip
from neobert.types import PackedBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerTimes:
    """Medians over the rounds, in seconds."""

    passes: float
    """Forward, backward and clipping."""

    optimizers: dict[str, float]
    measuring: float
    """What measuring the attention logits of a step adds to it."""

    precision: str
    """Of the products, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Orthogonality:
    """How far a factor is from orthogonal."""

    kind: str
    method: str
    num_steps: int
    dtype: str
    worst_value: float
    """Largest deviation of a singular value from 1."""

    distance: float
    """To U V^T, as a fraction of its size."""


def measure_times(settings: StepSettings, *, cpu_time: bool = False) -> OptimizerTimes:
    """Rounds of one gradient and a step of every optimizer; `settings.warmup` rounds are not counted.

    With `cpu_time` the seconds are those that the process spent on a CPU, in one thread: for a machine that is busy.
    """
    device, source = torch.device(settings.device), made_up_rows(settings)
    settings, reason = bind_precision(settings, source.model)
    dtype = product_dtype(settings)
    model, _, _ = build_model(settings, source.model, device, dtype)
    section = OptimizerSection(lr=1e-6)
    sections = {name: replace(section, name=name) for name in OPTIMIZERS}  # type: ignore[arg-type]
    for name in ("adamw", "normuon"):
        sections[f"{name}, cautious decay"] = replace(sections[name], cautious_weight_decay=True)
    split = replace(section.muon_config, split_heads=True)
    sections["normuon, heads split"] = replace(sections["normuon"], muon_config=split)
    heads = source.model.num_attention_heads
    optimizers = {name: build_optimizer(model, own, dtype=dtype, num_heads=heads) for name, own in sections.items()}
    clip = QKClip(model.module.encoder, MuonSection(clipping_interval=1, clipping_threshold=1e9))
    batches = [batch.to(device) for batch in itertools.islice(source.batches, min(8, settings.steps))]
    seconds: dict[str, list[float]] = {name: [] for name in ("passes", "measured", *optimizers)}
    keep = torch.zeros((), dtype=torch.bool, device=device)
    measure = partial(_time, device=device, clock=time.process_time if cpu_time else time.perf_counter)
    torch.set_num_threads(1 if cpu_time else torch.get_num_threads())
    for number in range(settings.warmup + settings.steps):
        batch = batches[number % len(batches)]
        with clip.measuring(0, 1):
            found = {"measured": measure(partial(_make_gradient, model, batch))}
        model.zero_grad(set_to_none=True)
        found["passes"] = measure(partial(_make_gradient, model, batch))
        for name, optimizer in optimizers.items():
            found[name] = measure(partial(step_unless, optimizer, keep))
        model.zero_grad(set_to_none=True)
        if number >= settings.warmup:
            for name, value in found.items():
                seconds[name].append(value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return OptimizerTimes(
        passes=medians["passes"],
        optimizers={name: medians[name] for name in optimizers},
        measuring=statistics.median(m - p for m, p in zip(seconds["measured"], seconds["passes"])),
        precision=f"{settings.precision}, {reason}",
    )


def _make_gradient(model: nn.Module, batch: PackedBatch) -> None:
    (model(batch).loss_sum / batch.num_targets).backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)


def _time(work: Callable[[], None], *, device: torch.device, clock: Callable[[], float]) -> float:
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def make_matrices(kind: str, *, width: int, count: int) -> Tensor:
    """`[count, width, columns]` in double precision, equal for equal arguments; wide ones have 2.75 times `width`."""
    generator = torch.Generator().manual_seed(0)
    columns = width * 11 // 4 if kind == "wide" else width
    matrices = torch.randn(count, width, columns, generator=generator, dtype=torch.float64)
    if kind != "decaying":
        return matrices
    u, _, v = torch.linalg.svd(matrices)
    return u * torch.logspace(0, -3, width, dtype=torch.float64) @ v


def measure_orthogonality(
    *, width: int = 256, count: int = 4, steps: tuple[int, ...] = (3, 4, 5, 6, 8)
) -> list[Orthogonality]:
    """Every method, number of steps and type of products, on both kinds of matrices."""
    found = []
    for kind in ("wide", "square", "decaying"):
        matrices = make_matrices(kind, width=width, count=count)
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        expected = u @ v
        for method in ORTHOGONALIZATIONS:
            for dtype in (torch.float32, torch.bfloat16):
                for num_steps in steps:
                    factor = orthogonalize(matrices.float(), method=method, num_steps=num_steps, dtype=dtype).double()
                    found.append(
                        Orthogonality(
                            kind=kind,
                            method=method,
                            num_steps=num_steps,
                            dtype=str(dtype).removeprefix("torch."),
                            worst_value=(torch.linalg.svdvals(factor) - 1).abs().max().item(),
                            distance=((factor - expected).norm() / expected.norm()).item(),
                        )
                    )
    return found


def describe_times(times: OptimizerTimes, interval: int = 10) -> str:
    """The times as a table."""
    rows = [
        f"| {name} | {seconds * 1e3:,.1f} ms | {seconds / (times.passes + seconds):.1%} |"
        for name, seconds in times.optimizers.items()
    ]
    seconds = times.measuring / interval
    rows.append(
        f"| attention logits, every {interval} steps | {seconds * 1e3:,.1f} ms | "
        f"{seconds / (times.passes + seconds):.1%} |"
    )
    head = f"Products in {times.precision}."
    return "\n".join(
        [head, "", f"| | a step (passes: {times.passes * 1e3:,.0f} ms) | fraction of it |", "|---|---|---|", *rows]
    )


def describe_orthogonality(results: list[Orthogonality]) -> str:
    """The deviations as a table, one line for each kind of matrix, method and type."""
    steps = sorted({f.num_steps for f in results})
    cells: dict[tuple[str, str, str], list[str]] = {}
    for f in results:
        cells.setdefault((f.kind, f.method, f.dtype), []).append(f"{f.worst_value:.3f}, {f.distance:.3f}")
    head = "| matrices | method | products | " + " | ".join(f"{n} steps" for n in steps) + " |"
    lines = ["| " + " | ".join([*key, *values]) + " |" for key, values in cells.items()]
    return "\n".join([head, "|" + "---|" * (3 + len(steps)), *lines])
