"""How fast a disk writes what must be on it, as a checkpoint must."""

import os
import shutil
import tempfile
import time
from pathlib import Path

_BLOCK = os.urandom(2**20) * 4
_MOST = 16
"""Blocks."""

_SECONDS = 0.5


def find_existing(path: Path) -> Path:
    """`path`, or the closest above it that exists."""
    absolute = path.absolute()
    return next(found for found in (absolute, *absolute.parents) if os.path.lexists(found))


def measure_write(folder: Path) -> tuple[float, int]:
    """Bytes a second of a file that is written and flushed block by block, and bytes that are free; the file is gone
    afterwards.

    Raises:
        OSError: it is no folder, or nothing can be written there.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        start, written = time.perf_counter(), 0
        for _ in range(_MOST):
            written += file.write(_BLOCK)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - start
            if seconds > _SECONDS:
                break
    return written / seconds, shutil.disk_usage(folder).free
