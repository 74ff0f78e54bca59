"""What the machine has: a device that torch can use, what Triton and inductor compile with, and the faster precision.

Problems are found before any data is prepared. The first launch of a Triton kernel, inductor's included, compiles a
small C module against Python's headers, which slim images lack.

What `trainer.mixed_precision: auto` means on a GPU is in its capabilities: bf16 where it has it. On a CPU it is not:
without instructions for it bf16 is several times slower than fp32, with them several times faster, and libraries decide
which of them are used. So two matrix products of the model's shape are timed, one in each precision. bf16 also converts
weights and activations back and forth, so it is used only when its product is clearly faster.
"""

import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from neobert.config.schema import Config

C_COMPILERS = ("gcc", "clang", "cc")
"""What Triton looks for when the variable CC is not set."""

NO_DEVICES = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs."""


def find_device_problems(config: Config, device_type: str) -> list[str]:
    """Why the device of the run is not there, or a GPU would be left idle."""
    asked = config.trainer.device
    unused = find_unused_gpu() if asked in ("auto", "cuda") and not config.trainer.means_cpu else None
    if unused is not None:
        return [f"trainer.device: {asked}, but {unused}"]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[device_type]:
        return [f"trainer.device: {device_type}, but torch sees none here; write trainer.device: auto or cpu"]
    return []


def find_tool_problems(config: Config, device_type: str, *, inductor: bool, kernel: str | None) -> list[str]:
    """What inductor needs on a CPU, or Triton on a GPU, and does not find, with the keys that ask for it.

    Args:
        inductor: whether blocks are compiled by inductor.
        kernel: the loss kernel of the run.
    """
    if inductor and device_type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return [
            "trainer.torch_compile: true with torch_compile_backend: inductor needs a C++ compiler on a CPU and none "
            "is on the PATH; install g++ or set trainer.torch_compile: false"
        ]
    if device_type != "cuda":
        return []
    compiled = "true" if config.trainer.torch_compile else "null, which is true on a GPU"
    asked = [
        (inductor, f"trainer.torch_compile: {compiled}", "trainer.torch_compile: false"),
        (
            kernel in ("triton", "liger"),
            f"model.kernel_backend: {config.model.kernel_backend}",
            "model.kernel_backend: torch",
        ),
        (config.model.attn_backend == "flex", "model.attn_backend: flex", "model.attn_backend: sdpa"),
    ]
    needed = [(key, remedy) for uses, key, remedy in asked if uses]
    missing = find_missing_tools() if needed else None
    if missing is None:
        return []
    keys, remedies = (", ".join(words) for words in zip(*needed))
    return [f"{keys}: compiling for this GPU needs {missing}; or write {remedies}"]


def find_unused_gpu(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> str | None:
    """Why torch does not see the NVIDIA GPU of this machine, and the remedy; None when it sees one, or there is none.

    A GPU that CUDA_VISIBLE_DEVICES hides is none.
    """
    devices = sorted((root / "dev").glob("nvidia[0-9]*")) + sorted((root / "dev").glob("dxg"))
    if torch.cuda.is_available() or not devices or environment.get("CUDA_VISIBLE_DEVICES", "0") in NO_DEVICES:
        return None
    if devices[0].name == "dxg" and shutil.which("nvidia-smi", path=environment.get("PATH")) is None:
        return None  # Windows' subsystem for Linux has this file for GPUs of all makers.
    found = f"there is an NVIDIA GPU (/dev/{devices[0].name}) and torch {torch.__version__} "
    if torch.version.cuda is None:
        return (
            f"{found}is a build without CUDA; install one with it (https://pytorch.org/get-started/locally), or write "
            "trainer.device: cpu to train on the CPU"
        )
    driver = root / "proc/driver/nvidia/version"
    version = driver.read_text().partition("\n")[0] if driver.is_file() else "its version is not known"
    return (
        f"{found}cannot use it: it needs a driver for CUDA {torch.version.cuda} ({version}); update the driver, "
        "install a torch for an older CUDA (https://pytorch.org/get-started/previous-versions), or write "
        "trainer.device: cpu to train on the CPU"
    )


def find_missing_tools(
    include: str | None = None, environment: Mapping[str, str] = os.environ, start: Callable[[], object] | None = None
) -> str | None:
    """What is missing to compile Triton's C module, None when nothing is.

    A module that is in Triton's cache needs neither: where something seems to be missing, it is tried.

    Args:
        include: folder of Python's headers; None: this Python's.
        start: starts Triton's driver; None: the real one.
    """
    folder = include or sysconfig.get_paths()["include"]
    more = os.pathsep.join(environment.get(name, "") for name in ("CPATH", "C_INCLUDE_PATH"))
    searched = [folder, *(path for path in more.split(os.pathsep) if path)]
    missing = []
    names = (environment["CC"],) if environment.get("CC") else C_COMPILERS
    if not any(shutil.which(name.split()[0], path=environment.get("PATH")) for name in names):
        missing.append(f"a C compiler ({', '.join(names)}: install gcc)")
    if not any((Path(path) / "Python.h").is_file() for path in searched):
        missing.append(f"Python's headers ({folder}/Python.h: install python3-dev, or the package of this Python)")
    if not missing:
        return None
    try:
        (start or _start_triton)()
    except Exception:  # Of compilers, files, the driver: any kind.
        return " and ".join(missing)
    return None


def _start_triton() -> object:
    import triton  # Not installed with every build of torch.

    return triton.runtime.driver.active.utils


def use_expandable_segments(environment: "os._Environ[str]" = os.environ) -> None:
    """Has CUDA's allocator grow its blocks, which leaves fewer holes when sizes vary; where the user set nothing.

    Call it before CUDA starts: the allocator reads its variable once.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if torch.version.cuda is not None and not any(name in environment for name in names):
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def set_determinism(deterministic: bool) -> None:
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


LEAST_GAIN = 1.2
"""How many times faster the bf16 product must be on a CPU."""

_ROWS, _FIRST_ROWS = 2048, 16
"""Of a product; the first ones say how many of them `_SECONDS` pay for."""

_REPEATS = 5
_SECONDS = 0.1
"""Of one product at most. Without instructions for bf16 some CPUs are a hundred times slower in it, and 2,048 rows of a
base-size model take half a minute."""


def choose_device_type(config: Config) -> str:
    """What `trainer.device` names: `cuda`, `cpu` or `mps`; `auto` is `cuda` when there is a GPU, else `cpu`."""
    if config.trainer.means_cpu:
        return "cpu"
    if config.trainer.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.trainer.device


def choose_precision(config: Config) -> tuple[str, str]:
    """`bf16` or `no`, and the reason, with the numbers that were measured."""
    return choose_device_precision(choose_device_type(config), config.model.hidden_size, config.model.intermediate_size)


def choose_device_precision(device_type: str, inner: int, outer: int) -> tuple[str, str]:
    """`choose_precision` for products of `inner x outer` weights on `cuda`, `cpu` or `mps`."""
    if device_type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU has bfloat16") if supported else ("no", "this GPU has no bfloat16")
    if device_type == "mps":
        return "no", "bfloat16 was never tried on mps"
    fp32, bf16, rates = _measure_precisions(inner, outer)
    return choose_faster(fp32=fp32, bf16=bf16), f"{rates} (bf16 is used from {LEAST_GAIN} times as many)"


def find_slow_bf16(config: Config) -> str | None:
    """What to say of a run in bf16 on a CPU that multiplies fp32 at least twice as fast; None otherwise."""
    fp32, bf16, rates = _measure_precisions(config.model.hidden_size, config.model.intermediate_size)
    if fp32 < 2 * bf16:
        return None
    return f"trainer.mixed_precision: bf16 is slow here: {rates}; write trainer.mixed_precision: auto"


def _measure_precisions(inner: int, outer: int) -> tuple[float, float, str]:
    """FLOP/s of the CPU in fp32 and in bf16, and both as words."""
    fp32, bf16 = (measure_product(_ROWS, inner, outer, dtype) for dtype in (torch.float32, torch.bfloat16))
    words = (
        f"products of up to {_ROWS} x {inner} x {outer} make {bf16 / 1e9:,.1f} GFLOP/s in bf16 and {fp32 / 1e9:,.1f} "
        "in fp32 on this CPU"
    )
    return fp32, bf16, words


def resolve_precision(asked: str, device_type: str, inner: int, outer: int) -> tuple[str, str]:
    """`bf16` or `fp32` of a benchmark that was asked for one of them, or for `auto`; and the reason."""
    if asked != "auto":
        return asked, "as asked for"
    precision, reason = choose_device_precision(device_type, inner, outer)
    return "bf16" if precision == "bf16" else "fp32", f"auto: {reason}"


def choose_faster(*, fp32: float, bf16: float) -> str:
    """The precision for two rates in FLOP/s."""
    return "bf16" if bf16 >= LEAST_GAIN * fp32 else "no"


def measure_product(rows: int, inner: int, outer: int, dtype: torch.dtype) -> float:
    """FLOP/s of `[rows, inner] x [inner, outer]` on the CPU, with fewer rows where so many take too long: the best of a
    few products, after those of `choose_product_rows`."""
    rows = choose_product_rows(rows, inner, outer, dtype)
    a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, outer, dtype=dtype)
    best = min(_time_product(a, b) for _ in range(_REPEATS))
    return 2 * rows * inner * outer / best


def choose_product_rows(rows: int, inner: int, outer: int, dtype: torch.dtype) -> int:
    """`rows`, or as many of them as `_SECONDS` pay for on the CPU, by two small products of which the first finds its
    code."""
    first = min(rows, _FIRST_ROWS)
    a, b = torch.ones(first, inner, dtype=dtype), torch.ones(inner, outer, dtype=dtype)
    for _ in range(2):
        seconds = _time_product(a, b)
    return min(rows, max(first, int(first * _SECONDS / seconds)))


def _time_product(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        torch.mm(a, b)
    return time.perf_counter() - start
