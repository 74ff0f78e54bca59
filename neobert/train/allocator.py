"""The C library's allocator, told to keep what is freed.

By default glibc maps every large block afresh and gives it back when it is freed. A training step on a CPU frees and
takes the same few hundred megabytes again and again, and the kernel clears every page each time: for scores, logits and
gradients that costs about as much as the arithmetic on them. Here large blocks come from the heap, and the heap keeps
up to 2 GB of free memory at its end. The peak stays what it was; between the peaks less is given back.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
"""Names and numbers of malloc.h of glibc."""


def keep_freed_memory() -> bool:
    """Sets the allocator of this process so. False where the C library is another one: then nothing changes."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has no such function.
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
