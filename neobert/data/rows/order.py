"""Randomness without state: every shuffle, mask and seed is a pure function of integers.

A key is a hash of a tuple, `key(seed, "masks", row)`: parts are folded in one after the other, never added, so that
(seed + 1, epoch) and (seed, epoch + 1) have nothing in common. From a key come permutations of any size without
memory, 64-bit hashes for positions, and numbers in [0, 1). All of it is 64-bit integer arithmetic (splitmix64), so
equal on every machine and library version. The golden values in the tests pin it: a change here changes the data
order of every run, so it must raise the version of the loader's state.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neobert.splitmix import BITS, GAMMA, Hashes, mix, mix_number

TAGS = {
    "documents": 1,
    "rows": 2,
    "shards": 3,
    "window": 4,
    "mixture": 5,
    "masks": 9,
    "mask_count": 10,
    "eval_rows": 11,
    "step": 16,
    "init": 17,
}
"""What a key is for, as the integer that is hashed. Numbers are never reused."""

_START = 0x243F6A8885A308D3


def key(*parts: int | str) -> int:
    """A 64-bit hash of a tuple of integers and tags (names of `TAGS`)."""
    value = _START
    for part in parts:
        number = TAGS[part] if isinstance(part, str) else int(part)
        value = mix_number((value + number + GAMMA) & BITS)
    return value


def extend_keys(keys: int | Hashes, parts: ArrayLike) -> Hashes:
    """Keys with one more part, for a whole array: `extend_keys(key(a), [b])[0] == key(a, b)`."""
    return mix(np.asarray(keys, dtype=np.uint64) + np.asarray(parts).astype(np.uint64) + np.uint64(GAMMA))


def mask_hashes(keys: Hashes, positions: ArrayLike) -> Hashes:
    """One 64-bit hash for each (key, position); `keys` and `positions` broadcast."""
    return mix(keys + (np.asarray(positions).astype(np.uint64) + np.uint64(1)) * np.uint64(GAMMA))


def uniforms(keys: Hashes) -> NDArray[np.float64]:
    """A number in [0, 1) for each key, with 53 random bits."""
    return (mix(keys ^ np.uint64(GAMMA)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform(from_key: int) -> float:
    """A number in [0, 1) from one key."""
    return float(uniforms(np.array([from_key], dtype=np.uint64))[0])


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed for torch's generators (dropout) before optimizer step `step` on `rank`, in [0, 2**63)."""
    return key(seed, "step", step, rank) >> 1


class Permutation:
    """A keyed bijection of [0, n) that needs no memory: `Permutation(n, key)(positions)`.

    A balanced Feistel network over the smallest even number of bits that holds n, with splitmix64 as its round
    function; values at or above n are sent through again until they fall below it (cycle walking).
    """

    _ROUNDS = 4

    def __init__(self, n: int, from_key: int) -> None:
        bits = max(2, (max(n, 1) - 1).bit_length())
        bits += bits % 2
        self._n = np.uint64(n)
        self._half = np.uint64(bits // 2)
        self._low = np.uint64((1 << (bits // 2)) - 1)
        self._keys = mix(np.arange(1, self._ROUNDS + 1, dtype=np.uint64) * np.uint64(GAMMA) + np.uint64(from_key))

    def __call__(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Images of `positions` (integers in [0, n)), int64."""
        images = self._network(np.asarray(positions).astype(np.uint64).reshape(-1))
        outside = images >= self._n
        while outside.any():
            images[outside] = self._network(images[outside])
            outside = images >= self._n
        return images.astype(np.int64)

    def _network(self, x: Hashes) -> Hashes:
        left, right = x >> self._half, x & self._low
        for round_key in self._keys:
            left, right = right, left ^ (mix(right ^ round_key) & self._low)
        return (left << self._half) | right
