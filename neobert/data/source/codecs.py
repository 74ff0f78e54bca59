"""What the bytes of a file go through before they are lines of UTF-8.

Compressed files are streams of bytes: .gz, .zst, .xz and .bz2. Recoded is text that is not lines of UTF-8, as if it
were: other Unicode encodings, old line ends, JSON that is not one value a line. What a layer gives is a function of the
file alone, so a cursor is a byte of it, as in a compressed file.
"""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
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
    """What such a file starts with."""

    open: Callable[[BinaryIO], BinaryIO]
    """The bytes in a file that is open already; closing it closes the file."""


def codec_of_name(name: str) -> str | None:
    """The codec of the ending of a name."""
    return next((codec_name for codec_name, codec in CODECS.items() if name.lower().endswith(codec.ending)), None)


def codec_of_content(head: bytes) -> str | None:
    """The codec of a file that starts with these bytes."""
    return next((codec_name for codec_name, codec in CODECS.items() if head.startswith(codec.magic)), None)


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


VALUES = "JSON values"
"""The layer that writes every JSON value in its own line."""

CARRIAGE_RETURNS = "carriage returns"
"""The layer that ends lines as everybody does."""

MAX_VALUE_BYTES = 64 << 20
"""Of one JSON value that is not in its own line."""

_TEXT_BLOCK = 1 << 16
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'  # Possessive: no stack of its parts, no second attempt.
_TOKEN = re.compile(_STRING + rb'|[{}\[\]]|"|[^\s,\x1e{}\[\]"]+', re.DOTALL)
_CLEAN = re.compile(rb"(" + _STRING + rb")|,(?=\s*[}\]])|(?<!\s)\s*[\r\n]\s*", re.DOTALL)
"""Strings, commas before the end of a list or an object, and line ends between values. A space that comes after another
starts no match: linear in a run of them."""


class RecodeError(OSError):
    """A file that is not what its first bytes say."""


def open_layers(raw: BinaryIO, layers: Sequence[str]) -> BinaryIO:
    """The lines in a file that is open already; closing them closes the file."""
    for layer in layers:
        raw = CODECS[layer].open(raw) if layer in CODECS else RECODERS[layer](raw)
    return raw


class _Chunks:
    """A file object over pieces of bytes."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, b""

    def read(self, size: int) -> bytes:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._rest = piece
        content, self._rest = self._rest[:size], self._rest[size:]
        return content


def _stream(pieces: Iterator[bytes], below: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(Stream(_Chunks(pieces), below), _TEXT_BLOCK))


def _unicode(encoding: str) -> Callable[[BinaryIO], BinaryIO]:
    def pieces(file: BinaryIO) -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder(encoding)()
        try:
            while block := file.read(_TEXT_BLOCK):
                yield decoder.decode(block).encode("utf-8")
            decoder.decode(b"", final=True)
        except UnicodeError as error:
            raise RecodeError(f"it starts as {encoding.upper()} and is not: {error}") from error

    return lambda file: _stream(pieces(file), file)


def _end_lines(file: BinaryIO) -> BinaryIO:
    return _stream((piece.replace(b"\r", b"\n") for piece in iter(lambda: file.read(_TEXT_BLOCK), b"")), file)


def _open_values(file: BinaryIO) -> BinaryIO:
    return _stream((value + b"\n" for value in split_values(file)), file)


def split_values(file: BinaryIO) -> Iterator[bytes]:
    """The JSON values of a file one after the other, each without line ends; those of a list at the top come singly.

    Raises:
        RecodeError: the last one does not end, or one is too large.
    """
    buffer, start, in_list, ended = file.read(_TEXT_BLOCK).removeprefix(codecs.BOM_UTF8), 0, False, False
    while not ended:
        block = file.read(max(_TEXT_BLOCK, len(buffer) - start))
        ended = not block
        buffer, start = buffer[start:] + block, 0
        depth = begin = 0
        for token in _TOKEN.finditer(buffer):
            mark = token[0]
            if mark == b'"' or (token.end() == len(buffer) and not ended and mark not in b"{}[]"):
                break  # It may continue in the next block.
            if depth == 0:
                begin = token.start()
                if mark in (b"[", b"]") and in_list == (mark == b"]"):
                    in_list, start = not in_list, token.end()
                    continue
            depth += (mark in (b"{", b"[")) - (mark in (b"}", b"]"))
            if depth <= 0:
                yield _clean(buffer[begin : token.end()])
                depth, start = 0, token.end()
        if len(buffer) - start > MAX_VALUE_BYTES:
            raise RecodeError(f"a JSON value in it has more than {MAX_VALUE_BYTES >> 20} MB; write one object a line")
    if rest := buffer[start:].strip(b" \t\r\n,\x1e"):
        raise RecodeError(f"its last JSON value does not end: {rest[:40].decode('utf-8', 'replace')!r}...")


def _clean(value: bytes) -> bytes:
    """A value in one line, without commas after the last part of a list or an object."""

    def clean(found: "re.Match[bytes]") -> bytes:
        if found[1] is None:
            return b"" if found[0] == b"," else b" "
        return found[1].replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\\n")

    return _CLEAN.sub(clean, value)


RECODERS: dict[str, Callable[[BinaryIO], Any]] = {
    "UTF-16": _unicode("utf-16"),
    "UTF-32": _unicode("utf-32"),
    CARRIAGE_RETURNS: _end_lines,
    VALUES: _open_values,
}
"""What gives lines of UTF-8 from another form of text."""
