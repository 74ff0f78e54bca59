"""Compressed files as streams of bytes, by the ending of their name: .gz and .zst."""

import gzip
import io
import zlib
from typing import Any, BinaryIO, cast

import zstandard

DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)
"""What reading a damaged or cut off file raises."""

TEXT_RATIO = 3
"""Bytes of text in a byte of a compressed file, about."""

_CHUNK = 1 << 8
"""Compressed bytes that are unfolded at once: a frame may hold thousands of times its size."""

_BLOCK = 1 << 20


def is_compressed(name: str) -> bool:
    """Whether a file of this name is decompressed while it is read."""
    return name.lower().endswith((".gz", ".zst"))


def open_decompressed(raw: BinaryIO, name: str) -> BinaryIO:
    """The bytes in a file that is open already; closing it closes the file."""
    if name.lower().endswith(".gz"):
        return cast(BinaryIO, _GzipFile(fileobj=raw, mode="rb"))
    if name.lower().endswith(".zst"):
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(raw), _BLOCK))
    return raw


def skip_bytes(file: BinaryIO, count: int) -> None:
    """Reads on over `count` bytes.

    Raises:
        EOFError: there are fewer.
    """
    while count:
        block = file.read(min(count, _BLOCK))
        if not block:
            raise EOFError(f"the file ends {count} bytes early")
        count -= len(block)


class _GzipFile(gzip.GzipFile):
    """Closes the file below it too."""

    def __init__(self, **arguments: Any) -> None:
        self._below: BinaryIO = arguments["fileobj"]
        super().__init__(**arguments)

    def close(self) -> None:
        super().close()
        self._below.close()


class _ZstdFile(io.RawIOBase):
    """Frames one after the other. The library's own reader takes a file that was cut off for one that ends."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame = self._decompressor.decompressobj()
        self._in_frame = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._raw.read(_CHUNK)
            if not chunk:
                if self._in_frame:
                    raise EOFError("the file ends in the middle of a frame")
                return 0
            self._ready = memoryview(self._decompress(chunk))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        super().close()
        self._raw.close()

    def _decompress(self, chunk: bytes) -> bytes:
        parts = []
        while chunk:
            self._in_frame = True
            parts.append(self._frame.decompress(chunk))
            if not self._frame.eof:
                break
            chunk, self._in_frame = self._frame.unused_data, False
            self._frame = self._decompressor.decompressobj()
        return b"".join(parts)
