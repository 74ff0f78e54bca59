"""What a run needs beside its device: a torch that can use it, and what Triton and inductor compile with.

Found out before any data is prepared. The first launch of a Triton kernel, inductor's included, compiles a small C
module against Python's headers, which slim images lack.
"""

import os
import shutil
import sysconfig
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
