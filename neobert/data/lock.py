"""One process at a time in a folder, by a lock that ends with the process that holds it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neobert.data.errors import DataError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes `folder` and holds the lock file in it; the folder may be removed or renamed inside.

    Raises:
        DataError: another process holds it.
    """
    path = folder / "lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(
                    f"another process is writing in {folder}; wait until it ends, or stop it and start this command "
                    "again, which goes on where it was"
                ) from error
            # The holder before may have removed the folder between our opening and our locking.
            if not path.exists() or path.stat().st_ino != os.fstat(handle).st_ino:
                continue
            yield
            return
        finally:
            os.close(handle)
