"""What the machine lets this process use: control groups, CPUs, and how its threads wait for each other.

OpenMP, which computes for torch, starts as many threads as the process has CPUs by its affinity. It does not see the
quota of a control group (`docker run --cpus 2`), beyond which the system stops all threads for a while. And its threads
spin while they wait: where other programs want the same CPUs, a thread that spins keeps one busy that the thread it
waits for could use. Threads that sleep after a short spin lose little on a quiet machine (docs/performance.md).

Both are read once, from the environment, when torch is imported.

A launcher that is killed (kill -9, the OOM killer) cannot end the processes that it started: they see that they have
another parent.
"""

import math
import os
import platform
import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path

SPIN_COUNT = 20_000
"""Rounds that a waiting thread spins before it sleeps; GNU's OpenMP makes 300,000."""

WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""What of the environment decides how threads wait."""

_parent = os.getppid()  # Now, before anything that takes time is imported.


def _see_parent() -> None:
    global _parent
    _parent = os.getppid()


os.register_at_fork(after_in_child=_see_parent)


def launcher_is_gone() -> bool:
    """Whether torchrun, which `accelerate launch` uses too, has started this process and ended since."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _parent


def prepare_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets the number of OpenMP's threads and how they wait, unless the user did or torch is here already."""
    if "torch" in sys.modules:
        return
    if "OMP_NUM_THREADS" not in environment and available_cpus() < affine_cpus():
        environment["OMP_NUM_THREADS"] = str(available_cpus())
    if not any(name in environment for name in WAITING):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def describe_waiting(environment: MutableMapping[str, str] = os.environ) -> str:
    """How threads wait, as the environment says it."""
    return (
        ", ".join(f"{name}={environment[name]}" for name in WAITING if name in environment) or "OpenMP's own spinning"
    )


def describe_cpu(root: Path = Path("/")) -> str:
    """The name of the processor, as far as the system says it."""
    file = root / "proc/cpuinfo"
    lines = file.read_text().splitlines() if file.is_file() else ()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def affine_cpus() -> int:
    """CPUs on which the system may run this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may keep busy: those of its affinity, or the quota of a control group, rounded up.

    Args:
        root: of the file system; another one in tests.
    """
    return min([affine_cpus(), *(max(1, math.ceil(quota)) for quota in _quotas(root))])


def _quotas(root: Path) -> Iterator[float]:
    """CPUs that each control group around this process allows."""
    for group in control_groups("cpu", root):
        if group.version == 2:
            quota, _, period = (group.read("cpu.max") or "max 100000").partition(" ")
        else:
            quota, period = group.read("cpu.cfs_quota_us") or "-1", group.read("cpu.cfs_period_us") or "100000"
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)


# ---- control groups ----

_TOP = Path("sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Group:
    """A control group of this process, or one above it."""

    folder: Path
    version: int
    """1 or 2."""

    def read(self, name: str) -> str | None:
        """The text of one of its files, without the line break; None where there is none."""
        file = self.folder / name
        return file.read_text().strip() if file.is_file() else None


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Group]:
    """The control groups (containers, batch systems) that may limit what `controller` ("cpu", "memory") hands to this
    process, innermost first.

    Args:
        root: of the file system; another one in tests.
    """
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, version = root / _TOP, 2
        elif controller in controllers.split(","):
            top, version = root / _TOP / controller, 1
        else:
            continue
        folder = top / path.strip("/")
        for group in (folder, *folder.parents):
            yield Group(group, version)
            if group == top:
                break
