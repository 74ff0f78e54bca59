"""Fingerprints of data: digests that change when documents change, in the form of now and in the one before.

A fingerprint is a text that is saved and compared. Where its form was changed, a `Fingerprint` also knows the text that
the version before wrote for the same data, so that checkpoints and folders made by that version still fit.

Reading all of a corpus at every start would cost minutes, so of large data a sample is hashed. What it covers:

| data | sizes | content | cost |
|---|---|---|---|
| files (`fingerprint_files`) | of each, with its name | 16 spread blocks of 4 kB | 64 kB read a file |
| documents on disk (`digest_documents`) | of every one | 8 spread blocks of 1 kB of 128 spread ones | 1 MB read |

Spread means evenly, from the first to the last. An edit that keeps all sizes and is between the blocks is not seen.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DOCUMENTS, _BLOCKS, _BLOCK_BYTES = 128, 8, 1024


class Fingerprint(str):
    """A fingerprint that also knows what the version before called the same data."""

    before: str

    def __new__(cls, now: str, before: str) -> "Fingerprint":
        made = super().__new__(cls, now)
        made.before = before
        return made

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # Else it could not be sent to other processes.
        return Fingerprint, (str(self), self.before)


def before(fingerprint: str) -> str:
    """The fingerprint in the form of the version before."""
    return fingerprint.before if isinstance(fingerprint, Fingerprint) else fingerprint


def fits(saved: object, now: object) -> bool:
    """Whether a saved fingerprint, in either form, is of the data of now; anything else must be equal."""
    return saved == now or (isinstance(now, Fingerprint) and saved == now.before)


def combine(parts: Iterable[str], make: Callable[[list[str]], str]) -> Fingerprint:
    """The fingerprint that `make` makes of others."""
    parts = list(parts)
    return Fingerprint(make(parts), make([before(part) for part in parts]))


def digest_json(*parts: Any) -> str:
    """sha256 of values as JSON."""
    return "sha256:" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def digest_documents(
    lengths: Iterable[NDArray[np.int64]], count: int, content: Callable[[int], bytes | memoryview]
) -> str:
    """sha256 over the length of every document and spread blocks of spread documents.

    Args:
        lengths: of all documents in order, in arrays of any size.
        count: number of documents.
        content: the bytes of a document.
    """
    digest = hashlib.sha256(f"2\0{count}\0".encode())
    for array in lengths:
        digest.update(array.astype(np.int64).tobytes())
    for document in spread(count, _DOCUMENTS):
        for block in _blocks(content(document)):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, evenly from the first to the last."""
    numbers: list[int] = np.unique(np.linspace(0, max(0, count - 1), most).astype(np.int64))[:count].tolist()
    return numbers


def _blocks(content: bytes | memoryview) -> Iterator[bytes | memoryview]:
    """All of a short content, blocks of a long one."""
    if len(content) <= _BLOCKS * _BLOCK_BYTES:
        yield content
        return
    for begin in np.linspace(0, len(content) - _BLOCK_BYTES, _BLOCKS).astype(np.int64).tolist():
        yield content[begin : begin + _BLOCK_BYTES]
