"""What a run on a GPU checks before it prepares anything, on machines without one: files and torch.cuda are made up."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from neobert.config.load import ConfigError
from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.model.peak import PEAKS, name_without_peak, peak_flops
from neobert.train import build
from neobert.train.hardware import device as gpu
from neobert.train.hardware import machine, micro_batch
from neobert.train.hardware.device import choose_device_type
from neobert.train.hardware.machine import build_runtime, check_runtime, choose_compile
from neobert.train.hardware.memory import is_out_of_memory

Tiny = Callable[..., Config]
CUDA = torch.device("cuda")
ON_GPU = ("trainer.use_cpu=false",)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that there is a Hopper GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def make_machine(root: Path, *devices: str, driver: str | None = None) -> Path:
    (root / "dev").mkdir()
    for name in devices:
        (root / "dev" / name).touch()
    if driver is not None:
        (root / "proc/driver/nvidia").mkdir(parents=True)
        (root / "proc/driver/nvidia/version").write_text(f"{driver}\nGCC version: 12\n")
    return root


# ---- a GPU that torch cannot use ----


def test_a_driver_that_is_too_old_is_named_with_the_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_machine(tmp_path, "nvidia0", "nvidiactl", driver="NVRM version: 535.104.05")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = gpu.find_unused_gpu(root, {})
    assert found is not None
    for word in ("/dev/nvidia0", "CUDA 13.0", "535.104.05", "update the driver", "trainer.device: cpu"):
        assert word in found
    monkeypatch.setattr(torch.version, "cuda", None)
    found = gpu.find_unused_gpu(root, {})
    assert found is not None
    assert "a build without CUDA" in found
    assert "trainer.device: cpu" in found


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_a_gpu_that_is_hidden_or_not_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    root = make_machine(tmp_path, "nvidia0")
    assert gpu.find_unused_gpu(root, {"CUDA_VISIBLE_DEVICES": hidden}) is None
    assert gpu.find_unused_gpu(root, {"CUDA_VISIBLE_DEVICES": "0"}) is not None
    (root / "dev/nvidia0").unlink()
    (root / "dev/nvidiactl").touch()
    assert gpu.find_unused_gpu(root, {}) is None
    (root / "dev/dxg").touch()
    assert gpu.find_unused_gpu(root, {"PATH": str(tmp_path)}) is None
    (root / "nvidia-smi").touch(0o755)
    assert gpu.find_unused_gpu(root, {"PATH": str(tmp_path)}) is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.find_unused_gpu(root, {"PATH": str(tmp_path)}) is None


def test_a_run_does_not_train_on_the_cpu_silently(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_unused_gpu", lambda: "there is one; write trainer.device: cpu")
    with pytest.raises(StartupError, match=r"^trainer\.device: auto, but there is one; write trainer\.device: cpu$"):
        check_runtime(tiny(tmp_path, *ON_GPU))
    check_runtime(tiny(tmp_path))
    check_runtime(tiny(tmp_path, *ON_GPU, "trainer.device=cpu"))


# ---- trainer.device ----


def test_the_device_of_a_run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(device: str, use_cpu: bool = False) -> str:
        return choose_device_type(tiny(tmp_path, f"trainer.use_cpu={use_cpu}", f"trainer.device={device}"))

    for available, auto in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=available: found)
        assert [chosen(d) for d in ("auto", "cpu", "cuda", "mps")] == [auto, "cpu", "cuda", "mps"]
        assert chosen("auto", use_cpu=True) == chosen("cpu", use_cpu=True) == "cpu"
    with pytest.raises(ConfigError, match=r"trainer\.device: cuda, but trainer\.use_cpu is true; remove one"):
        tiny(tmp_path, "trainer.device=cuda")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "find_unused_gpu", lambda: None)
    with pytest.raises(
        StartupError, match=rf"trainer\.device: {device}, .* write trainer\.device: auto or cpu"
    ) as refused:
        check_runtime(tiny(tmp_path, *ON_GPU, f"trainer.device={device}", "trainer.mixed_precision=bf16"))
    assert "bfloat16" not in str(refused.value)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    check_runtime(tiny(tmp_path, *ON_GPU, "trainer.device=mps"))


# ---- what is compiled, and with what ----


def test_null_compiles_on_a_gpu_alone(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=available: found)
        assert choose_compile(tiny(tmp_path, *ON_GPU)) is available
        assert choose_compile(tiny(tmp_path)) is False
        for value in (True, False):
            assert choose_compile(tiny(tmp_path, f"trainer.torch_compile={value}")) is value
            assert choose_compile(tiny(tmp_path, *ON_GPU, f"trainer.torch_compile={value}")) is value


def test_missing_tools_are_named_unless_triton_starts_all_the_same(tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("Failed to find C compiler")

    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    without = {"PATH": str(tmp_path / "bin")}
    find = gpu.find_missing_tools
    found = find(str(tmp_path / "include"), without, broken)
    assert found is not None
    assert "install gcc" in found
    assert f"{tmp_path}/include/Python.h" in found
    assert find(str(tmp_path / "include"), without, lambda: None) is None, "a cached module needs neither"
    (tmp_path / "bin/gcc").touch(0o755)
    found = find(str(tmp_path / "include"), without, broken)
    assert found is not None
    assert "compiler" not in found
    (tmp_path / "include/Python.h").touch()
    assert find(str(tmp_path / "include"), without, broken) is None
    assert find("/nowhere", {**without, "CPATH": str(tmp_path / "include")}, broken) is None
    found = find(str(tmp_path / "include"), {**without, "CC": "mycc -O2"}, broken)
    assert found is not None
    assert "mycc" in found


@pytest.mark.usefixtures("on_cuda")
def test_a_run_asks_for_tools_where_it_compiles(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_missing_tools", lambda: "a C compiler")
    kernel = "triton" if machine.choose_kernel("auto", device=CUDA) == "triton" else "torch"

    def problem(*keys: str) -> str:
        try:
            check_runtime(tiny(tmp_path, *ON_GPU, *keys))
        except StartupError as error:
            return str(error)
        return ""

    assert "trainer.torch_compile: null, which is true on a GPU" in problem("model.kernel_backend=torch")
    assert "or write trainer.torch_compile: false" in problem("model.kernel_backend=torch")
    off = ("trainer.torch_compile=false", "model.kernel_backend=torch")
    assert problem(*off) == problem("trainer.torch_compile_backend=aot_eager", "model.kernel_backend=torch") == ""
    assert "model.attn_backend: flex: compiling for this GPU needs a C compiler" in problem(
        *off, "model.attn_backend=flex"
    )
    if kernel == "triton":
        assert "or write model.kernel_backend: torch" in problem("trainer.torch_compile=false")
    monkeypatch.setattr(gpu, "find_missing_tools", lambda: None)
    assert problem() == ""


def test_blocks_are_not_cut_where_buckets_end(tiny: Tiny, tmp_path: Path) -> None:
    """A block under DistributedDataParallel, with buckets far smaller than it, is one graph."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList(torch.nn.Linear(512, 512) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts:
                x = part(x)
            return x

    def count(compile_blocks: Callable[[Any], None]) -> int:
        encoder: Any = torch.nn.Module()
        encoder.layers = torch.nn.ModuleList([Block()])
        encoder.forward = lambda x: encoder.layers[0](x)
        wrapped = torch.nn.parallel.DistributedDataParallel(encoder, bucket_cap_mb=1)
        compile_blocks(encoder)
        counters.clear()
        wrapped(torch.ones(2, 512)).sum().backward()
        torch.compiler.reset()
        return counters["stats"]["unique_graphs"] + counters["aot_autograd"]["total"]

    keys = ("trainer.torch_compile=true", "trainer.torch_compile_backend=aot_eager")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with torch._dynamo.config.patch(optimize_ddp=True):
            cut = count(lambda encoder: encoder.layers[0].compile(backend="aot_eager"))
            whole = count(lambda encoder: build.compile_blocks(tiny(tmp_path, *keys), encoder))
    finally:
        torch.distributed.destroy_process_group()
    assert whole == 2 < cut  # each is counted by dynamo and by AOT


def test_auto_measures_the_step_that_the_run_makes(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU compiled where the run is; on a CPU never."""
    built: list[Config] = []

    def stop(config: Config, *others: Any) -> Any:
        built.append(config)
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(micro_batch, "build_module", stop)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 1)
    config = tiny(tmp_path, "trainer.torch_compile=true")
    for device in ("cuda", "cpu"):
        runtime: Any = type("Runtime", (), {"device": torch.device(device)})()
        given: dict[str, Any] = dict.fromkeys(("model_config", "attention", "tokenizer"))
        assert micro_batch.build_measure(config, runtime, **given)(4) is None
    assert [c.trainer.torch_compile for c in built] == [True, False]


# ---- memory ----


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "NCCL Error 1: unhandled cuda error\nLast error:\nCuda failure 'out of memory'",
        "Last error:\nCuda failure 2 'out of memory'",
        "Triton Error [CUDA]: out of memory",
        "backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    ],
)
def test_every_kind_of_out_of_memory_is_known(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(ValueError(words))

    def step(rows: int) -> None:
        if rows > 2:
            raise RuntimeError(words)

    # `auto` takes the last number that fits.
    fits = {rows: micro_batch._survives(step, rows) for rows in (1, 2, 4)}
    assert fits == {1: True, 2: True, 4: False}


def test_other_errors_of_cuda_are_not_out_of_memory() -> None:
    for words in ("CUDA error: invalid configuration argument", "CUDA error: device-side assert triggered"):
        assert not is_out_of_memory(RuntimeError(words))


def test_segments_of_the_allocator_grow_where_the_user_set_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    environment: Any = {}
    gpu.use_expandable_segments(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        environment = {name: "max_split_size_mb:128"}
        gpu.use_expandable_segments(environment)
        assert environment == {name: "max_split_size_mb:128"}
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    build_runtime(tiny(tmp_path)).close()
    assert "PYTORCH_ALLOC_CONF" not in os.environ, "not on a CPU"


# ---- peaks ----


def test_peaks_are_those_of_the_exact_device_and_of_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(name: str, dtype: torch.dtype = torch.bfloat16) -> float | None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return peak_flops(CUDA, dtype)

    assert peak("NVIDIA H100 80GB HBM3") == 989e12
    assert peak("NVIDIA H100 PCIe") == 756e12
    assert peak("NVIDIA H100 NVL") == 835e12
    assert peak("NVIDIA A10") == 125e12
    assert peak("NVIDIA A100 80GB PCIe") == 312e12
    assert peak("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert name_without_peak(CUDA) == "NVIDIA GeForce RTX 4090 Laptop GPU"
    assert peak("Tesla T4") is None
    assert name_without_peak(CUDA) is None
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert peak("NVIDIA H200", torch.float32) == 67e12
        torch.set_float32_matmul_precision("high")
        assert peak("NVIDIA H200", torch.float32) == 494.5e12
        assert peak("Tesla V100-SXM2-16GB", torch.float32) == 15.7e12
    finally:
        torch.set_float32_matmul_precision(before)
    assert peak_flops(torch.device("cpu"), torch.float32) is None
    assert name_without_peak(torch.device("cpu")) is None
    assert all(p.fp8 is None or p.bf16 is not None for p in PEAKS.values())
    assert all(p.bf16 is None or p.bf16 > p.fp32 for p in PEAKS.values())
