"""Checks of `gpu_check` on the machine and on single kernels. Torch and numpy suffice."""

import os
import platform
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neobert.benchmark.gpu.gpu_table import Bench, Found, NotAsExpected
from neobert.benchmark.loss_kernels import Case, measure
from neobert.benchmark.settings import PRESETS, StepSettings
from neobert.benchmark.step_time import made_up_rows
from neobert.kernels.linear_cross_entropy import KERNELS, PACKAGES, kernel_problem
from neobert.model.attention import (
    ATTENTION,
    AttentionBackend,
    VarlenPlan,
    activate_flash_3,
    attend_varlen_by_torch,
    choose_attention,
    reference_attention,
)
from neobert.model.fp8 import fp8_problem
from neobert.model.segments import Segments
from neobert.train.hardware.device import C_COMPILERS, find_missing_tools, find_unused_gpu

_PACKAGES = ("torch", "triton", "numpy", "liger-kernel", "flash-attn", "flash-attn-3", "transformers", "accelerate")
_PAPER = PRESETS["neobert"]
_HEADS, _LAYERS = _PAPER["num_attention_heads"], _PAPER["num_hidden_layers"]
_HIDDEN = _PAPER["hidden_size"]
_FFN = 2048
"""2/3 of the intermediate size of the paper, as SwiGLU has it."""


def milliseconds(work: Callable[[], object], bench: Bench, repeats: int = 20) -> float:
    """Mean time of `work` after three calls, by events of the GPU; one call on a CPU."""
    if bench.dry:
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    for _ in range(3):
        work()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        work()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / repeats


# --- the machine -----------------------------------------------------------------------------------------------------


def check_machine(bench: Bench) -> Found:
    """What the machine has, and one launch of a kernel that has to be compiled here."""
    found = Found()
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, C_COMPILERS)), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    found.add("compiler", f"{compiler}, {header}{'' if header.exists() else ' is missing'}", has_header=header.exists())
    versions = {name: _version_of(name) for name in _PACKAGES}
    text = ", ".join(f"{name} {number}" for name, number in versions.items() if number is not None)
    found.add("versions", f"Python {platform.python_version()}, {text}, CUDA of torch {torch.version.cuda}", **versions)
    found.add("driver", _describe_driver())
    for number in range(torch.cuda.device_count() if not bench.dry else 0):
        gpu = torch.cuda.get_device_properties(number)
        capability = f"{gpu.major}.{gpu.minor}"
        text = f"{gpu.name}, capability {capability}, {gpu.total_memory / 2**30:.0f} GiB"
        found.add(f"GPU {number}", text, name=gpu.name, capability=capability)
    if bench.dry and (unused := find_unused_gpu()) is not None:
        raise NotAsExpected(unused, found)
    if not bench.dry and (missing := find_missing_tools()) is not None:
        raise NotAsExpected(f"compiling for this GPU needs {missing}", found)
    if kernel_problem("triton", torch.device(bench.device)) is None:
        found.add("first launch of Triton", f"{_launch_triton(bench):.0f} ms, compilation included")
    return found


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _describe_driver() -> str:
    asks = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    if shutil.which(asks[0]) is None:
        return "there is no nvidia-smi"
    done = subprocess.run(asks, capture_output=True, text=True, timeout=30)
    return "; ".join((done.stdout or done.stderr).split("\n")).strip("; ")


def _launch_triton(bench: Bench) -> float:
    start = time.perf_counter()
    measure(Case("triton", 16, 16, 64, "fp32", bench.device), 1)
    return 1e3 * (time.perf_counter() - start)


# --- attention -------------------------------------------------------------------------------------------------------


def check_borders(bench: Bench) -> Found:
    """Attention of one layer over the same documents with the borders filled up to several lengths."""
    found = Found()
    backend = choose_attention("auto", device=torch.device(bench.device), dtype=torch.bfloat16)
    for rows, length, mean in bench.size(((64, 1024, 250), (32, 1024, 500), (8, 4096, 1000)), ((2, 64, 20),)):
        segments = _segments(bench, rows=rows, length=length, mean=mean)
        real = torch.unique(segments.cu_seqlens_cpu)
        longest = 1 << (int(real.diff().max()) - 1).bit_length()
        kinds = {
            "as the loader makes them": segments,
            "real": with_borders(segments, real),
            f"real, longest {longest}": replace(with_borders(segments, real), max_seqlen=min(longest, length)),
            "filled to a power of two": with_borders(segments, filled(real, 1 << len(real).bit_length())),
            "filled to L // 8 a row": with_borders(segments, filled(real, rows * (length // 8 + 1) + 1)),
        }
        for name, own in kinds.items():
            prepared = backend.prepare(own) if own is segments else prepare_all_borders(backend, own)
            forward, backward, peak = _time_attention(backend, own, prepared, bench)
            found.add(
                f"{rows} x {length}, {name}",
                f"{len(own.cu_seqlens)} borders, forward {forward:.3f} ms, backward {backward:.3f} ms, "
                f"{_LAYERS} layers {_LAYERS * (forward + backward):.1f} ms, {peak / 1e9:.2f} GB beside the inputs",
                borders=len(own.cu_seqlens),
                forward_ms=forward,
                backward_ms=backward,
                peak_bytes=peak,
            )
    return found


def filled(borders: Tensor, length: int) -> Tensor:
    """The borders with the last one repeated."""
    return torch.cat([borders, borders[-1:].expand(max(0, length - len(borders)))])


def with_borders(segments: Segments, borders: Tensor) -> Segments:
    """The same segments with other borders, on the device of the segments."""
    borders = borders.int()
    return replace(segments, cu_seqlens=borders.to(segments.ids.device), cu_seqlens_cpu=borders)


def prepare_all_borders(backend: AttentionBackend, segments: Segments) -> Any:
    """What `attend` reads when the kernel gets the borders that `prepare_varlen` leaves out too."""
    prepared = backend.prepare(segments)
    if isinstance(prepared, VarlenPlan):
        return prepared._replace(launches=((segments.cu_seqlens, segments.ids.numel()),))
    return prepared


def _segments(bench: Bench, *, rows: int, length: int, mean: float) -> Segments:
    settings = StepSettings(preset="tiny", vocab_size=300, rows=rows, length=length, mean_document=mean, steps=1)
    return next(made_up_rows(settings).batches).segments.to(torch.device(bench.device))


def _time_attention(
    backend: AttentionBackend, segments: Segments, prepared: Any, bench: Bench
) -> tuple[float, float, int]:
    """Milliseconds of forward and backward, and bytes at the peak beside the inputs (0 on a CPU)."""
    q, k, v, grad = _inputs(segments, bench)

    def forward() -> Tensor:
        return backend.attend(q, k, v, prepared, scale=0.125)

    first = milliseconds(forward, bench)
    before = _reset_peak(bench)
    both = milliseconds(lambda: torch.autograd.grad(forward(), (q, k, v), grad), bench)
    peak = 0 if bench.dry else torch.cuda.max_memory_allocated() - before
    return first, max(both - first, 0.0), peak


def _inputs(
    segments: Segments, bench: Bench, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and the gradient of the output, `[T, heads, 64]`."""
    heads = bench.size(_HEADS, 2)
    generator = torch.Generator(bench.device).manual_seed(0)
    shape = (segments.ids.numel(), heads, 64)
    q, k, v, grad = (torch.randn(shape, device=bench.device, dtype=dtype, generator=generator) for _ in range(4))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def _reset_peak(bench: Bench) -> int:
    if bench.dry:
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


_FAR = 2e-2
"""Largest difference from the definition, as a part of its norm."""


def check_attention(bench: Bench) -> Found:
    """Every backend that can run, and flash-attn 3 by torch instead of torch's own kernel."""
    found, far = Found(), []
    for name, backend in ATTENTION.items():
        problem = backend.problem(torch.device(bench.device), torch.bfloat16, 64)
        if problem is not None:
            found.lines.append(f"{name}: cannot run here, it {problem}")
            continue
        far += _check_backend(found, name, backend, bench)
    far += _check_kernels_of_torch(found, bench) if not bench.dry else []
    if far:
        raise NotAsExpected(f"{', '.join(far)}: not the definition", found)
    return found


def _check_backend(found: Found, name: str, backend: AttentionBackend, bench: Bench) -> list[str]:
    try:
        difference = distance_to_definition(backend, bench)
    except Exception as error:  # Of a kernel: the others have their turn.
        found.lines.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
        return [name]
    segments = _segments(bench, rows=bench.size(64, 2), length=bench.size(1024, 64), mean=bench.size(250.0, 20.0))
    forward, backward, _ = _time_attention(backend, segments, backend.prepare(segments), bench)
    found.add(
        name,
        f"{backend.kernel}: forward {forward:.3f} ms, backward {backward:.3f} ms, {_LAYERS} layers "
        f"{_LAYERS * (forward + backward):.1f} ms; differs from the definition by {difference:.1e} of it",
        forward_ms=forward,
        backward_ms=backward,
        difference=difference,
    )
    return [] if difference < _FAR else [name]


def _check_kernels_of_torch(found: Found, bench: Bench) -> list[str]:
    """torch's varlen_attn with its own kernel, and with flash-attn 3 where torch can run it."""
    varlen = replace(ATTENTION["flash_attn_varlen"], attend=attend_varlen_by_torch)
    far = _check_backend(found, "torch's kernel", replace(varlen, kernel="FlashAttention 2 of torch"), bench)
    if torch.cuda.get_device_capability()[0] != 9:
        problem: str | None = "needs compute capability 9"
    else:
        problem = activate_flash_3()
    if problem is not None:
        found.lines.append(f"flash-attn 3 by torch: cannot run here, {problem[:200]}")
        return far
    try:
        return far + _check_backend(found, "flash-attn 3 by torch", replace(varlen, kernel="flash-attn 3"), bench)
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def distance_to_definition(backend: AttentionBackend, bench: Bench, dtype: torch.dtype = torch.bfloat16) -> float:
    """Of output and gradients over a few documents, the largest, against fp32, as a part of its norm."""
    segments = _segments(bench, rows=2, length=bench.size(512, 64), mean=bench.size(100.0, 20.0))
    q, k, v, grad = _inputs(segments, bench, dtype)
    real = (segments.ids.flatten() > 0)[:, None, None]
    grad = grad * real
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    want = reference_attention(wide[0], wide[1], wide[2], segments, scale=0.125) * real
    got = backend.attend(q, k, v, backend.prepare(segments), scale=0.125) * real
    pairs = [(got, want)]
    pairs += zip(torch.autograd.grad(got, (q, k, v), grad), torch.autograd.grad(want, wide, grad.float()))
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)


# --- products --------------------------------------------------------------------------------------------------------


def check_products(bench: Bench) -> Found:
    """Rates of the products of a layer."""
    found = Found()
    tokens = bench.size(65536, 8)
    total = {"bf16": 0.0, "fp8": 0.0}
    problem = fp8_problem(torch.device(bench.device))
    in_fp8 = problem is None
    for layer, outer, inner in (
        ("qkv", 3 * _HIDDEN, _HIDDEN),
        ("out", _HIDDEN, _HIDDEN),
        ("gate_up", 2 * _FFN, _HIDDEN),
        ("down", _HIDDEN, _FFN),
    ):
        x, w, grad = (
            torch.randn(shape, device=bench.device, dtype=torch.bfloat16)
            for shape in ((tokens, inner), (outer, inner), (tokens, outer))
        )
        flop = 2 * tokens * outer * inner
        for kind, a, b in (("forward", x, w.T), ("d input", grad, w), ("d weight", grad.T, x)):
            taken = milliseconds(lambda a=a, b=b: a @ b, bench)  # type: ignore[misc]
            total["bf16"] += taken
            text, values = f"bf16 {taken:.3f} ms, {flop / taken / 1e9:.0f} TFLOP/s", {"bf16_ms": taken}
            if in_fp8:
                fp8 = _time_fp8(a, b, bench)
                values["fp8_ms"] = fp8
                total["fp8"] += fp8
                text += f"; fp8 {fp8:.3f} ms, {flop / fp8 / 1e9:.0f} TFLOP/s"
            found.add(f"{layer} {kind}", text, **values)
    sums = {name: _LAYERS * taken for name, taken in total.items() if taken}
    found.add(f"{_LAYERS} layers", ", ".join(f"{name} {taken:.1f} ms" for name, taken in sums.items()), **sums)
    if not in_fp8:
        found.lines.append(f"fp8: cannot run here, it {problem}")
    return found


def _time_fp8(a: Tensor, b: Tensor, bench: Bench) -> float:
    """Of the product alone, with a scale for each row and column; quantising is not in it."""
    left = a.contiguous().to(torch.float8_e4m3fn)
    right = b.T.contiguous().to(torch.float8_e4m3fn).T
    scales = torch.ones(a.shape[0], 1, device=bench.device), torch.ones(1, b.shape[1], device=bench.device)
    return milliseconds(
        lambda: torch._scaled_mm(left, right, scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16), bench
    )


# --- loss ------------------------------------------------------------------------------------------------------------

_FAR_GRADIENT = 1e-2


def check_loss(bench: Bench) -> Found:
    """Time and memory of every loss kernel, and its gradients against the definition's."""
    found, far = Found(), []
    rows, hidden, vocabulary = bench.size((13312, 768, 30592), (48, 32, 300))
    for name in dict.fromkeys((*KERNELS, *PACKAGES)):
        problem = kernel_problem(name, torch.device(bench.device))
        if problem is not None:
            found.lines.append(f"{name}: cannot run here, it {problem}")
            continue
        try:
            difference = gradient_distance(name, bench)
            seconds, size = measure(Case(name, rows, hidden, vocabulary, "bf16", bench.device), bench.size(5, 1))
        except Exception as error:  # Of a kernel: the others have their turn.
            found.lines.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            far.append(name)
            continue
        found.add(
            name,
            f"{seconds * 1e3:.2f} ms, {size / 1e6:,.0f} MB; gradients differ from the definition by {difference:.1e}",
            seconds=seconds,
            peak_bytes=size,
            difference=difference,
        )
        far += [name] if not difference < _FAR_GRADIENT else []
    if far:
        raise NotAsExpected(f"{', '.join(far)}: not the definition", found)
    return found


def gradient_distance(name: str, bench: Bench, *, low: bool = True) -> float:
    """The largest of both gradients over a few rows, against double precision, as a part of its norm.

    Args:
        low: computes under autocast to bf16, else in fp32.
    """
    rows, hidden, vocabulary = bench.size((700, 768, 30592), (48, 32, 300))
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, hidden, generator=generator)
    weight = torch.randn(vocabulary, hidden, generator=generator) * 0.05
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[::3] = -100
    want = _gradients("reference", (states.double(), weight.double(), targets), bench, low=False)
    got = _gradients(name, (states, weight, targets), bench, low=low)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want))


def _gradients(name: str, inputs: tuple[Tensor, Tensor, Tensor], bench: Bench, *, low: bool) -> tuple[Tensor, ...]:
    states, weight, targets = (x.to(bench.device) for x in inputs)
    states, weight = states.requires_grad_(), weight.requires_grad_()
    with torch.autocast(bench.device, torch.bfloat16) if low else nullcontext():
        loss, *_ = KERNELS[name](states, weight, targets)
    return torch.autograd.grad(loss, (states, weight))
