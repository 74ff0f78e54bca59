"""Compressed files as streams of bytes: .gz, .zst, .xz and .bz2."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import zstandard

DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, lzma.LZMAError)
"""What reading a damaged or cut off file raises."""

TEXT_RATIO = 3
"""Bytes of text in a byte of a compressed file, about."""

_CHUNK = 1 << 8
"""Compressed bytes that are unfolded at once: a frame may hold thousands of times its size."""

_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec:
    """A way to compress a whole file."""

    ending: str
    magic: bytes
    """What such a file begins with."""

    open: Callable[[BinaryIO], BinaryIO]
    """The bytes in a file that is open already; closing it closes the file."""


def codec_of_name(name: str) -> str | None:
    """The codec that the ending of a name stands for."""
    return next((word for word, codec in CODECS.items() if name.lower().endswith(codec.ending)), None)


def codec_of_content(head: bytes) -> str | None:
    """The codec of a file that begins with these bytes."""
    return next((word for word, codec in CODECS.items() if head.startswith(codec.magic)), None)


def strip_codec(name: str) -> str:
    """A name without the ending of a compression.

    >>> strip_codec("train.jsonl.gz")
    'train.jsonl'
    """
    codec = codec_of_name(name)
    return name if codec is None else name[: -len(CODECS[codec].ending)]


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


class Stream(io.RawIOBase):
    """What a file object gives, for a buffer above it. Closes the file below it too."""

    def __init__(self, file: Any, below: BinaryIO) -> None:
        self._file, self._below = file, below

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

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


def _open_gzip(raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, _GzipFile(fileobj=raw, mode="rb"))


def _open_zstd(raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_ZstdFile(raw), _BLOCK))


def _open_xz(raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(Stream(lzma.LZMAFile(raw), raw), _BLOCK))


def _open_bz2(raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(Stream(bz2.BZ2File(raw), raw), _BLOCK))


CODECS: dict[str, Codec] = {
    "gzip": Codec(ending=".gz", magic=b"\x1f\x8b", open=_open_gzip),
    "zstd": Codec(ending=".zst", magic=b"\x28\xb5\x2f\xfd", open=_open_zstd),
    "xz": Codec(ending=".xz", magic=b"\xfd7zXZ\x00", open=_open_xz),
    "bzip2": Codec(ending=".bz2", magic=b"BZh", open=_open_bz2),
}
"""What text may be compressed with."""
