"""Writing that has reached the disk when it returns, and one writer at a time.

One process at a time in a folder or at a file, by a lock that ends with the process that holds it.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neobert.errors import DataError


def write_json(path: Path, value: Any) -> None:
    """Replaces a file as a whole, on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    sync(temporary)
    temporary.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(
                    f"{busy}; wait until it ends, or stop it and start this command again, which resumes its work"
                ) from error
            # The holder before may have removed the file between our opening and our locking.
            if not path.exists() or path.stat().st_ino != os.fstat(handle).st_ino:
                continue
            yield
            return
        finally:
            os.close(handle)
