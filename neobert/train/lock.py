"""One run in an output folder at a time, and one folder for all ranks.

The lock is an flock on `<output_dir>/.lock`, held by rank 0: it ends with the process, however that ends, so a resume
after a crash never waits for a stale lock. The file's text names the holder for the message of the one that is refused.
"""

import fcntl
import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from neobert.errors import StartupError
from neobert.train.agreement import RankError, exchange

if TYPE_CHECKING:
    from neobert.train.runtime import Runtime

LOCK = ".lock"
VISIBLE_SECONDS = 10.0
"""Network file systems show a new file to other nodes after a few seconds."""

_held: dict[Path, int] = {}
# By folder: a start that fails leaves its lock behind, and the next start of the same process takes it over.


def acquire_lock(output_dir: Path) -> None:
    """Takes the lock of an existing folder for the rest of this process, or until `release_lock`.

    Raises:
        StartupError: another process holds it; with its pid and host.
    """
    path, held = output_dir / LOCK, _held.get(output_dir.absolute())
    if held is not None and path.exists() and os.path.samestat(os.fstat(held), path.stat()):
        return
    release_lock(output_dir)  # Of a folder that is gone, or was renamed.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _read_holder(descriptor)
        os.close(descriptor)
        raise StartupError(
            f"trainer.output_dir: another run is writing into {output_dir} ({holder}); wait for it, stop it, or choose "
            "another trainer.output_dir"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    _held[output_dir.absolute()] = descriptor


def release_lock(output_dir: Path) -> None:
    """Gives the lock back; nothing where this process holds none."""
    descriptor = _held.pop(output_dir.absolute(), None)
    if descriptor is not None:
        os.close(descriptor)


def _read_holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f"pid {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has just started"


def check_shared(output_dir: Path, runtime: "Runtime") -> None:
    """Raises when the ranks do not see one folder: each would keep a part of every checkpoint to itself. Collective.

    Raises:
        RankError: on every rank.
    """
    if runtime.world == 1:
        return
    name = f".shared-{secrets.token_hex(8)}"
    if runtime.is_main:
        (output_dir / name).touch()
    path = output_dir / exchange(runtime, name)[0]
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    seen = exchange(runtime, (path.exists(), socket.gethostname()))
    if runtime.is_main:
        path.unlink()
    blind = [f"rank {rank} on {host}" for rank, (exists, host) in enumerate(seen) if not exists]
    if blind:
        raise RankError(
            f"trainer.output_dir: {output_dir} is not one folder for all processes: {', '.join(blind)} cannot see what "
            "rank 0 writes; choose a folder on a file system that all nodes share"
        )
