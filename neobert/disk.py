"""Writing that has reached the disk when it returns, and one writer at a time.

One process at a time in a folder or at a file, by a lock that ends with the process that holds it, however that ends:
nothing waits for the lock of a process that crashed. The text of the locked file names its holder.
"""

import glob
import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from neobert.errors import DataError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that replaces `path` as a whole, and on the disk, when the block ends without an error.

    It is beside `path` and has the same suffix; an error removes it and leaves `path` as it was.
    """
    temporary = path.with_name(f".new-{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole, on the disk when this returns."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON with sorted keys."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def cache_folder(name: str) -> Path | None:
    """Where this user keeps what takes time to find out again; None where there is no such place."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "neobert" / name if os.path.isabs(cache) else None


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock_file(path: Path) -> int:
    """Locks a file, which is made if need be, until the descriptor that this returns is closed.

    Raises:
        BlockingIOError: another process holds it; with its pid and host.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not lock_descriptor(descriptor, blocking=False):
                raise BlockingIOError(_read_holder(descriptor))
            # The holder before may have removed the file between our opening and our locking.
            if is_locked_by(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def is_locked_by(descriptor: int, path: Path) -> bool:
    """Whether a descriptor of `lock_file` is of the file that is at `path` now."""
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def _read_holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f"pid {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has just started"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes `folder` and holds the lock file in it; the folder may be removed or renamed inside.

    Raises:
        DataError: another process holds it.
    """
    with _hold(folder / "lock", f"another process is writing in {folder}"):
        yield


@contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Holds a lock file beside `output`, which is gone afterwards.

    Raises:
        DataError: another process holds it.
    """
    lock = _lock_beside(output)
    with _hold(lock, f"another process is writing {output}"):
        for leftover in output.parent.glob(f".new-*-{glob.escape(output.name)}"):  # Of a writer that was killed.
            leftover.unlink()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def check_no_writer(output: Path) -> None:
    """Raises DataError when another process holds the `only_writer` of a file."""
    if _lock_beside(output).exists():
        with only_writer(output):
            pass


def _lock_beside(output: Path) -> Path:
    return output.with_name(f".{output.name}.lock")


@contextmanager
def _hold(path: Path, busy: str) -> Iterator[None]:
    try:
        descriptor = lock_file(path)
    except BlockingIOError as error:
        raise DataError(
            f"{busy}; wait until it ends, or stop it and start this command again, which resumes its work"
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)
