"""What one process finds in files, for all processes that see the same files.

Listing, looking into and fingerprinting many files takes minutes, and a file system that serves hundreds of processes
at once takes longer still. So rank 0 does it, and the others get what it found, where they see the same files: of a
path that they have in common, spread files have the same size, time of change and inode. Where one rank has another
path, or a copy of its own, every rank looks for itself; the fingerprints are compared later in any case.
"""

import os
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from neobert.data.fingerprint import spread

T = TypeVar("T")

COMPARED = 16
"""Files of a source that ranks compare."""

Seen = Sequence[tuple[str, int, int, int]]
"""Path, size, time of change in nanoseconds and inode of some files."""


class Share(Protocol):
    """What rank 0 finds, on every rank. All ranks call it in the same order, within `sharing_errors`."""

    def __call__(self, find: Callable[[], T], *, path: Sequence[str] = (), seen: Callable[[], Seen] | None = None) -> T:
        """
        Args:
            find: called by rank 0, and by every rank as soon as they see other files; its result is picklable.
            path: where this rank would look; the others must look there too.
            seen: what rank 0 has found it in; the others must see the same there.
        """


def alone(find: Callable[[], T], *, path: Sequence[str] = (), seen: Callable[[], Seen] | None = None) -> T:
    """Of a single process."""
    return find()


def see(paths: Sequence[str]) -> Seen:
    """Some of these files, spread evenly, as this process sees them; one that it does not see has no size."""
    return [_see(paths[number]) for number in spread(len(paths), COMPARED)]


def _see(path: str) -> tuple[str, int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return path, -1, 0, 0
    return path, found.st_size, found.st_mtime_ns, found.st_ino
