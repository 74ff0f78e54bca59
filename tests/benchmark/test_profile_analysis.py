"""The analysis of a trace: whose time it is, that nothing counts twice, and what is said about it."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neobert.benchmark import profile_analysis
from neobert.benchmark.profile_analysis import (
    CATEGORIES,
    Analysis,
    ProfileError,
    analyse,
    analyse_path,
    classify,
    describe,
)
from neobert.config.schema import Config
from neobert.train.loop import pretrain
from neobert.train.record import profiling

Tiny = Callable[..., Config]
OTHERS = "norms, elementwise and other"


def event(cat: str, name: str, start: float, end: float, tid: int = 1, launch: int | None = None) -> dict[str, Any]:
    args = {} if launch is None else {"correlation": launch}
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": tid, "pid": 1, "args": args}


def microseconds(analysis: Analysis) -> dict[str, float]:
    """Times of the categories that have any."""
    total = analysis.milliseconds_per_step * len(analysis.steps) * 1e3
    assert sum(analysis.shares.values()) == pytest.approx(1)
    assert tuple(analysis.shares) == CATEGORIES
    return {name: pytest.approx(share * total) for name, share in analysis.shares.items() if share > 0}


CUDA = [
    event("user_annotation", "ProfilerStep#5", 0, 100),
    event("user_annotation", "ProfilerStep#6", 100, 200),
    event("user_annotation", "ProfilerStep#7", 200, 205),  # Was not made: the run was stopped.
    event("kernel", "vectorized_elementwise_kernel", -10, 5, 7, launch=99),  # Of the step before.
    event("cpu_op", "aten::mm", 10, 20),
    event("cuda_runtime", "cudaLaunchKernel", 12, 14, launch=1),
    event("kernel", "sm90_xmma_gemm_bf16", 20, 60, 7, launch=1),
    event("cpu_op", "aten::_flash_attention_forward", 22, 30),
    event("cuda_driver", "cuLaunchKernelEx", 25, 26, launch=2),
    event("kernel", "flash_fwd_kernel_cutlass", 60, 80, 7, launch=2),
    event("cuda_runtime", "cudaMemcpyAsync", 32, 33, launch=3),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 50, 70, 20, launch=3),  # Hidden behind kernels.
    event("cuda_runtime", "cudaMemcpyAsync", 35, 36, launch=4),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 80, 85, 20, launch=4),
    event("cuda_runtime", "cudaLaunchKernel", 40, 41, launch=5),
    event("kernel", "ncclDevKernel_AllReduce", 85, 100, 22, launch=5),
    event("cuda_runtime", "cudaLaunchKernel", 42, 43, launch=6),
    event("kernel", "triton_poi_fused_add_0", 90, 95, 7, launch=6),
    event("cpu_op", "_TritonLinearCrossEntropyBackward", 105, 120, 2),
    event("cpu_op", "aten::mm", 106, 110, 2),
    event("cuda_runtime", "cudaLaunchKernel", 107, 108, 2, launch=7),
    event("kernel", "nvjet_tst_128x256", 110, 150, 7, launch=7),
    event("user_annotation", "Optimizer.step#AdamW.step", 150, 160),
    event("cuda_runtime", "cudaLaunchKernel", 152, 153, launch=8),
    event("kernel", "multi_tensor_apply_kernel", 160, 190, 7, launch=8),
    event("cuda_runtime", "cudaLaunchKernel", 195, 196, launch=9),
    event("kernel", "vectorized_elementwise_kernel", 205, 220, 7, launch=9),  # Of the last step, behind the host.
    event("cuda_runtime", "cudaLaunchKernel", 230, 231, launch=10),
    event("kernel", "vectorized_elementwise_kernel", 240, 250, 7, launch=10),  # Behind the window.
    event("gpu_user_annotation", "ProfilerStep#5", 0, 95, 7),
    {"ph": "M", "name": "process_name", "ts": 0, "pid": 1, "tid": 1},
]


def test_streams_of_a_gpu() -> None:
    analysis = analyse({"traceEvents": CUDA, "profiled_steps": [5, 6]})
    assert (analysis.device, analysis.steps, analysis.milliseconds_per_step) == ("cuda", (5, 6), 0.110)
    assert microseconds(analysis) == {
        "GEMM": 40,
        "attention": 20,
        "loss": 40,
        OTHERS: 25,
        "optimizer": 30,
        "communication": 10,
        "copies": 5,
        "idle": 50,
    }
    gaps = [(g.milliseconds, g.step, g.after, g.before) for g in analysis.gaps]
    assert gaps == [
        (0.015, 5, "vectorized_elementwise_kernel", "sm90_xmma_gemm_bf16"),
        (0.015, 6, "multi_tensor_apply_kernel", "vectorized_elementwise_kernel"),
        (0.010, 6, "ncclDevKernel_AllReduce", "nvjet_tst_128x256"),
        (0.010, 6, "nvjet_tst_128x256", "multi_tensor_apply_kernel"),
    ]
    assert [(o.name, o.category, o.calls_per_step, o.mean_microseconds) for o in analysis.largest[:2]] == [
        ("sm90_xmma_gemm_bf16", "GEMM", 0.5, 40),
        ("nvjet_tst_128x256", "loss", 0.5, 40),
    ]


CPU = [
    event("user_annotation", "ProfilerStep#2", 0, 100),
    event("user_annotation", "data wait", 0, 10),
    event("cpu_op", "aten::linear", 12, 40),
    event("cpu_op", "aten::to", 13, 18),
    event("cpu_op", "aten::copy_", 14, 18),
    event("cpu_op", "aten::mm", 20, 40),
    event("cpu_op", "neobert::segmented_attention", 40, 60),
    event("cpu_op", "aten::bmm", 42, 50),
    event("cpu_op", "_ChunkedLinearCrossEntropy", 60, 80),
    event("cpu_op", "aten::mm", 60, 75),
    event("cpu_op", "aten::mul", 200, 290),  # Between two steps: an evaluation.
    event("cpu_op", "aten::mm", 30, 90, tid=2),  # Of another thread.
    event("user_annotation", "ProfilerStep#3", 300, 400),
    event("user_annotation", "Optimizer.step#AdamW.step", 310, 340),
    event("cpu_op", "aten::_fused_adamw_", 315, 335),
    *(event("cpu_op", "aten::add", 340 + 4 * i, 342 + 4 * i) for i in range(13)),
]


def test_nested_operations_of_a_cpu_count_once() -> None:
    analysis = analyse({"traceEvents": CPU})
    assert (analysis.device, analysis.steps, analysis.milliseconds_per_step) == ("cpu", (2, 3), 0.100)
    assert microseconds(analysis) == {
        "data wait": 10,
        "GEMM": 1 + 2 + 20,  # The product, and what its caller needs around the cast.
        "copies": 5,
        "attention": 20,
        "loss": 20,
        "optimizer": 30,
        OTHERS: 26,
        "idle": 2 + 20 + 10 + 12 * 2 + 10,
    }
    assert [(g.milliseconds, g.step, g.after, g.before) for g in analysis.gaps[:2]] == [
        (0.020, 2, "_ChunkedLinearCrossEntropy", "the end"),
        (0.010, 3, "the begin", "Optimizer.step#AdamW.step"),
    ]
    assert [(o.name, o.calls_per_step, o.mean_microseconds) for o in analysis.small] == []
    crowded = [*CPU, *(event("cpu_op", "aten::add", 80 + i, 80.5 + i) for i in range(9))]
    assert [(o.name, o.calls_per_step) for o in analyse({"traceEvents": crowded}).small] == [("aten::add", 11)]


def test_the_table_shows_all_of_it() -> None:
    text = describe(analyse({"traceEvents": CPU}))
    assert text.startswith("cpu, steps 2 to 3: 0.10 ms a step\n")
    assert "GEMM                                      0.01    11.5%" in text
    assert "\nnone\n" in text
    assert "0.020 ms in step 2: after _ChunkedLinearCrossEntropy, before the end" in text


@pytest.mark.parametrize(
    ("name", "around", "category"),
    [
        ("aten::addmm", ["ProfilerStep#1"], "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", [], "GEMM"),
        ("triton_tem_fused_mm_3", [], "GEMM"),
        ("triton_red_fused__to_copy_add_mean_mul_rsqrt_1", [], OTHERS),
        ("aten::bmm", ["neobert::segmented_attention_backward"], "attention"),
        ("void flash::flash_bwd_kernel<cutlass::bfloat16_t>", [], "attention"),
        ("aten::_to_copy", ["aten::linear"], "copies"),
        ("Memset (Device)", [], "copies"),
        ("aten::_foreach_norm", [], "optimizer"),
        ("aten::mm", ["_ChunkedLinearCrossEntropy"], "loss"),
        ("_RMSNormCPUBackward", [], OTHERS),
        ("data wait", [], "data wait"),
    ],
)
def test_categories(name: str, around: list[str], category: str) -> None:
    assert classify(name, around) == category


def test_the_trace_of_a_run(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """On a real trace of a CPU every category that a run has is found, and all of the time has an owner."""
    pretrain(tiny(tmp_path, "trainer.max_steps=5", "trainer.profiler_steps_start=3", "trainer.profiler_steps=2"))
    analysis = analyse_path(tmp_path)
    assert (analysis.device, analysis.steps) == ("cpu", (3, 4))
    found = microseconds(analysis)
    assert set(found) >= {"GEMM", "attention", "loss", OTHERS, "optimizer", "data wait", "idle"}
    assert all(share >= 0 for share in analysis.shares.values())
    marks = [e for e in json.loads((tmp_path / "profiler_trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    steps = [e["dur"] for e in marks if e["name"] in ("ProfilerStep#3", "ProfilerStep#4")]
    assert analysis.milliseconds_per_step == pytest.approx(sum(steps) / 2e3)
    assert len(analysis.gaps) == 5

    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["analyze_profile.py", str(tmp_path / "profiler_trace.json"), "--json"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(Path(__file__).parents[2] / "scripts/analyze_profile.py"), run_name="__main__")
    assert exit_info.value.code == 0
    assert json.loads(capsys.readouterr().out)["shares"] == analysis.shares


def test_the_names_of_the_trace_are_those_that_the_run_writes() -> None:
    assert (profile_analysis.TRACE, profile_analysis.DATA_WAIT) == (profiling.TRACE, profiling.DATA_WAIT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not there; train with trainer.profiler_steps_start"),
        ("{", "cannot be read as a trace"),
        ("[]", "no list `traceEvents`"),
        ('{"traceEvents": []}', "no mark `ProfilerStep#N`"),
    ],
)
def test_what_is_no_trace(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "profiler_trace.json").write_text(content)
    with pytest.raises(ProfileError, match=message):
        analyse_path(tmp_path)
