"""The hash of splitmix64 (Steele, Lea & Flood, 2014), which every order of rows and every mask is made with."""

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

BITS = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15
"""The step between two numbers of a sequence."""


def mix(x: Hashes) -> Hashes:
    """The finaliser, a bijection of 64-bit numbers: every input bit flips every output bit half of the time."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix_number(x: int) -> int:
    """`mix` of one number, several times faster than an array of one."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & BITS
    return x ^ (x >> 31)
