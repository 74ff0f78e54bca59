"""Child processes that are there at once: forks of this one, which has everything imported already."""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from devices import skip_without_fork
from ports import free_port

from neobert.benchmark.lives import renew_threads


def fork(
    work: Callable[[], int],
    log: Path | None,
    *,
    errors: Path | None = None,
    rank: int = 0,
    world: int = 1,
    port: int = 0,
) -> int:
    """Does `work` in a forked child as one rank of `world`; returns its process id.

    The child ends with the exit code that `work` returns, or 1 after an error; what it prints, and the traceback, is in
    `log`, or where this process prints without one. What goes to stderr is in `errors` where that is named.
    """
    skip_without_fork()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for descriptor, path in ((1, log), (2, errors or log)):
            if path is not None:
                with path.open("a") as file:
                    os.dup2(file.fileno(), descriptor)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # By the line, as in any process.
        if world > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in names.items()})
        renew_threads()
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
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise AssertionError(f"process {process} did not end within {seconds} s")


def wait_until(is_there: Callable[[], bool], process: int, log: Path) -> None:
    """Until a child has made something, which it must do within a minute, and before it ends."""
    deadline = time.monotonic() + 60
    while not is_there():
        assert not os.waitpid(process, os.WNOHANG)[0], log.read_text()
        assert time.monotonic() < deadline, "the child did not get far enough"
        time.sleep(0.01)


def kill(process: int) -> None:
    """kill -9, and until it is gone."""
    os.kill(process, signal.SIGKILL)
    assert wait_for(process) == -signal.SIGKILL


def run_program(words: Sequence[str]) -> int:
    """The exit code of `python WORDS`, a script or `-m` and a module, run in this process."""
    rest = list(words)
    while rest[0] in ("-u", "-P"):
        rest.pop(0)
    is_module = rest[0] == "-m"
    sys.argv = rest[1:] if is_module else rest
    run: Callable[..., Any] = runpy.run_module if is_module else runpy.run_path
    try:
        run(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


class ForkedProgram:
    """A `Popen` of `python ...` that is a fork of this process."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        assert command[0] == sys.executable

        def work() -> int:
            os.setsid()
            os.environ.update(env)
            return run_program(command[1:])

        self.pid = fork(work, None)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll() is None:
            self.returncode = wait_for(self.pid, timeout or 120)
        assert self.returncode is not None
        return self.returncode


def run_forked(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    before: Callable[[], None] = lambda: None,
    **_: Any,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of `python ...`, output captured, as a fork of this process. `before` is called there."""
    assert command[0] == sys.executable

    def work() -> int:
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        if cwd is not None:
            os.chdir(cwd)
        before()
        return run_program(command[1:])

    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "out", Path(folder) / "errors"
        code = wait_for(fork(work, out, errors=errors), 120)
        return subprocess.CompletedProcess(list(command), code, out.read_text(), errors.read_text())


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
