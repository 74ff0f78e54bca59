"""Checks of `gpu_check` on training steps, optimizers and inference over made-up rows. Torch and numpy suffice."""

import itertools
import json
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile, record_function

from neobert.benchmark.gpu.gpu_table import Bench, Found, NotAsExpected
from neobert.benchmark.optimizer_cost import measure_times
from neobert.benchmark.profile_analysis import analyse
from neobert.benchmark.settings import StepSettings
from neobert.benchmark.step_batches import make_documents
from neobert.benchmark.step_time import (
    StepTiming,
    build_model,
    build_step_optimizer,
    build_stepper,
    made_up_rows,
    make_step,
    measure_step,
    product_dtype,
    wait_for,
)
from neobert.inference.packed import hidden_states, plan_batches
from neobert.model.fp8 import emulate, fp8_problem, quantise, scaled_product

_TINY: dict[str, Any] = {
    "preset": "tiny",
    "vocab_size": 300,
    "length": 64,
    "rows": 2,
    "mean_document": 25.0,
    "precision": "fp32",  # bf16 is a hundred times slower on some CPUs.
    "steps": 2,
    "warmup": 1,
    "device": "cpu",
    "compile_backend": "eager",  # The others take longer than all the rest.
}
_FULL: dict[str, Any] = {"preset": "neobert", "length": 1024, "rows": 64, "steps": 10, "warmup": 3}
_FULL |= {"precision": "bf16", "device": "cuda"}


def step_settings(bench: Bench, **changes: Any) -> StepSettings:
    """The step of NeoBERT at 64 rows of 1,024, or a tiny one; both with these changes."""
    return StepSettings(**{**bench.size(_FULL, _TINY), **changes})


def check_compiled_step(bench: Bench) -> Found:
    """Speed at three sizes, compiled."""
    return _measure_steps(bench, bench.size((64, 32, 8), (2,)), compile=True)


def check_eager_step(bench: Bench) -> Found:
    """Speed at three sizes, eager."""
    return _measure_steps(bench, bench.size((64, 32, 8), (2,)), compile=False)


_FAR_LOSS = 0.01


def check_precision_keys(bench: Bench) -> Found:
    """The step with `trainer.bf16_residual` and `trainer.fp8`, alone and together: speed, and losses beside bf16's."""
    found, far = Found(), []
    residual: dict[str, Any] = {"bf16_residual": True}
    fp8 = {"fp8": bench.size("rowwise", "emulated")}
    variants = {"bf16": {}, "bf16_residual": residual, "fp8": fp8, "both": {**residual, **fp8}}
    variants = {name: {**keys, "compile": not bench.dry} for name, keys in variants.items()}
    problem = None if bench.dry else fp8_problem(torch.device(bench.device))
    if problem is None and not bench.dry:
        _check_product(found)
    expected = None
    for name, keys in variants.items():
        if "fp8" in keys and problem is not None:
            found.lines.append(f"{name}: cannot run here, it {problem}")
            continue
        try:
            losses = _first_losses(step_settings(bench, rows=bench.size(8, 2), **keys), bench.size(10, 2))
        except Exception as error:  # Of a kernel or of the compiler: the others have their turn.
            found.lines.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            far.append(name)
            continue
        expected = losses if expected is None else expected
        gap = ((losses - expected).abs() / expected).max().item()
        far += [] if gap < _FAR_LOSS else [name]
        found.add(name, f"losses of {len(losses)} steps within {gap:.1e} of those of bf16", difference=gap)
        speeds = _measure_steps(bench, bench.size((64, 8), (2,)), **keys)
        found.lines += [f"{name}, {line}" for line in speeds.lines]
        found.values[name] |= speeds.values
    if far:
        raise NotAsExpected(f"{', '.join(far)}: fails, or its losses are not those of bf16", found)
    return found


def _first_losses(settings: StepSettings, num_steps: int) -> torch.Tensor:
    """Mean losses of the first steps of a model, on the host."""
    torch.compiler.reset()
    device, source = torch.device(settings.device), made_up_rows(settings)
    model, _, _ = build_model(settings, source.model, device, product_dtype(settings))
    optimizer, losses = build_step_optimizer(model, settings), []
    for batch in itertools.islice(source.batches, num_steps):
        losses.append(make_step(model, optimizer, batch.to(device)).loss_sum / batch.num_targets)
    return torch.stack(losses).cpu()


def _check_product(found: Found) -> None:
    """The product of the GPU beside its emulation. Raises NotAsExpected where they differ."""
    x, weight = (torch.randn(rows, 768, device="cuda", dtype=torch.bfloat16) for rows in (512, 2304))
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        given = (*quantise(x, dtype), *quantise(weight))
        right = emulate(*given).float()
        gap = ((scaled_product(*given).float() - right).norm() / right.norm()).item()
        found.add(f"product of {dtype} and e4m3", f"differs from its emulation by {gap:.1e} of it", difference=gap)
        if not gap < 2**-7:
            raise NotAsExpected("torch._scaled_mm is not what is emulated", found)


def check_checkpointing(bench: Bench) -> Found:
    """Memory and speed of rows that would not fit otherwise."""
    return _measure_steps(bench, bench.size((128, 256), (2,)), compile=True, gradient_checkpointing=True)


def _measure_steps(bench: Bench, sizes: tuple[int, ...], **changes: Any) -> Found:
    """Each size by itself: one that does not fit in memory takes no other with it."""
    found = Found()
    for rows in sizes:
        torch.compiler.reset()
        if not bench.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            timing = measure_step(step_settings(bench, rows=rows, **changes))
        except torch.OutOfMemoryError as error:
            found.add(f"{rows} rows", f"out of memory: {str(error)[:120]}")
            continue
        found.add(f"{rows} rows", _describe_step(timing), **asdict(timing))
    return found


def _describe_step(timing: StepTiming) -> str:
    mfu = "unknown" if timing.mfu is None else f"{timing.mfu:.1%}"
    compiling = "" if timing.compile_seconds is None else f", compiled in {timing.compile_seconds:.1f} s"
    return (
        f"{timing.tokens_per_second:,.0f} real tokens/s, MFU {mfu}, {timing.gemm_fraction:.1%} of a GEMM of "
        f"{timing.gemm_flops / 1e12:,.1f} TFLOP/s, step {timing.seconds_p50 * 1e3:,.1f} ms (p95 "
        f"{timing.seconds_p95 * 1e3:,.1f}), peak {timing.peak_memory_bytes / 1e9:,.2f} GB, {timing.attention}, "
        f"{timing.kernel}{compiling}"
    )


def check_where_time_goes(bench: Bench) -> Found:
    """Kinds of kernels of three profiled steps, by the rules of `neobert analyze-profile`."""
    found = Found()
    for name, compiled in (("compiled", True), ("eager", False)):
        torch.compiler.reset()
        settings = step_settings(bench, compile=compiled)
        step = build_stepper(settings)
        for _ in range(settings.warmup):
            step()
        wait_for(torch.device(bench.device))
        activities = [ProfilerActivity.CPU, *([] if bench.dry else [ProfilerActivity.CUDA])]
        with profile(activities=activities) as recorded:
            for number in range(3):
                with record_function(f"ProfilerStep#{number}"):
                    step()
            wait_for(torch.device(bench.device))
        file = bench.folder / f"{name}.json"
        recorded.export_chrome_trace(str(file))
        analysis = analyse(json.loads(file.read_text()))
        parts = ", ".join(f"{kind} {part:.1%}" for kind, part in analysis.shares.items() if part >= 5e-4)
        found.add(name, f"{analysis.milliseconds_per_step:.1f} ms a step: {parts}", **asdict(analysis))
        found.lines += [
            f"{name}, {o.category}: {o.name[:70]}, {o.calls_per_step:.0f} x {o.mean_microseconds:.0f} us, {o.share:.1%}"
            for o in analysis.largest
        ]
    return found


def check_recompiles(bench: Bench) -> Found:
    """Graphs after the first step and after eight batches of other documents."""
    counters.clear()
    step = build_stepper(step_settings(bench, compile=True, steps=8, rows=bench.size(16, 2)))
    graphs = []
    for _ in range(8):
        step()
        graphs.append(counters["stats"]["unique_graphs"])
    found = Found()
    found.add("graphs", f"{graphs[0]} after the first step, {graphs[-1]} after eight", counts=graphs)
    breaks = dict(counters["graph_break"])
    if graphs[-1] != graphs[0] or breaks:
        raise NotAsExpected(f"graphs after each step: {graphs}; graph breaks: {breaks}", found)
    return found


def check_optimizers(bench: Bench) -> Found:
    """Every optimizer on one gradient."""
    times = measure_times(step_settings(bench, rows=bench.size(16, 2), steps=bench.size(5, 1)))
    found = Found()
    found.add("forward, backward, clipping", f"{times.passes * 1e3:.1f} ms", seconds=times.passes)
    for name, seconds in {**times.optimizers, "measured logits of muonclip": times.measuring}.items():
        part = seconds / (times.passes + seconds)
        found.add(name, f"{seconds * 1e3:.2f} ms, {part:.1%} of a step of these rows", seconds=seconds)
    return found


_LEAST_COSINE = 0.99


def check_inference(bench: Bench) -> Found:
    """Documents a batch at a time in three precisions, with equal weights."""
    documents = make_documents(
        bench.size(131_072, 600), mean=250.0, longest=bench.size(1024, 64), vocab_size=bench.size(30592, 300)
    )
    batches = plan_batches([len(document) for document in documents], bench.size(65536, 300))
    num_tokens = sum(map(len, documents))
    found, first, low = Found(), None, []
    for name, precision, matmul in (("fp32", "fp32", "highest"), ("TF32", "fp32", "high"), ("bf16", "bf16", "highest")):
        torch.set_float32_matmul_precision(matmul)
        settings = step_settings(bench, precision=precision)
        architecture, device = made_up_rows(settings).model, torch.device(bench.device)
        model, attention, _ = build_model(settings, architecture, device, product_dtype(settings))

        def embed(model: Any = model) -> list[torch.Tensor]:
            return [hidden_states(model.module, [documents[n] for n in batch]) for batch in batches]

        states = zip(embed(), ([len(documents[n]) for n in batch] for batch in batches))
        vectors = torch.stack([x.float().mean(0) for hidden, lengths in states for x in hidden.split(lengths)])
        seconds = []
        for _ in range(bench.size(3, 1)):
            wait_for(torch.device(bench.device))
            start = time.perf_counter()
            embed()
            wait_for(torch.device(bench.device))
            seconds.append(time.perf_counter() - start)
        first = vectors if first is None else first
        cosine = torch.cosine_similarity(vectors, first).min().item()
        rate = num_tokens / float(np.median(seconds))
        text = f"{rate:,.0f} tokens/s through {attention}, cosine to fp32 at least {cosine:.5f}"
        found.add(name, text, tokens_per_second=rate, cosine=cosine)
        low += [name] if not cosine > _LEAST_COSINE else []
    torch.set_float32_matmul_precision("highest")
    if low:
        raise NotAsExpected(f"{', '.join(low)}: vectors differ from those of fp32", found)
    return found
