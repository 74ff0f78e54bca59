"""Child processes that are there at once: forks of this one, which has everything imported already."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from accelerate.state import AcceleratorState
from devices import skip_without_fork
from ports import free_port


def fork(work: Callable[[], int], log: Path, *, rank: int = 0, world: int = 1, port: int = 0) -> int:
    """Does `work` in a forked child as one rank of `world`; returns its process id.

    The child ends with the exit code that `work` returns, or 1 after an error; what it prints, and the traceback, is in
    `log`.
    """
    skip_without_fork()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        if world > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in names.items()})
        # A run of this process that ended with an error has left Accelerate's idea of its processes.
        AcceleratorState._reset_state(reset_partial_state=True)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(process: int, seconds: float = 60) -> int:
    """Exit code of a child, negative for the signal that killed it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    raise AssertionError(f"process {process} did not end within {seconds} s")


def run_in_two(work: Callable[[], int], folder: Path) -> list[str]:
    """`run_on` two ranks."""
    return run_on(2, work, folder)


def run_on(world: int, work: Callable[[], int], folder: Path) -> list[str]:
    """Does `work` on so many ranks, which must all end with exit code 0; what each printed."""
    folder.mkdir(exist_ok=True)
    port, logs = free_port(), [folder / f"rank-{rank}.txt" for rank in range(world)]
    children = [fork(work, log, rank=rank, world=world, port=port) for rank, log in enumerate(logs)]
    codes = [wait_for(child, 120) for child in children]
    printed = [log.read_text() for log in logs]
    assert codes == [0] * world, "\n".join(printed)
    return printed
