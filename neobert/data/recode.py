"""Text that is not lines of UTF-8, as if it were: other Unicode encodings, old line ends, JSON that is not one value a
line. What a layer gives is a function of the file alone, so a cursor is a byte of it, as in a compressed file."""

import codecs
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, cast

from neobert.data.decompress import CODECS, Stream

VALUES = "JSON values"
"""The layer that writes every JSON value in a line of its own."""

CARRIAGE_RETURNS = "carriage returns"
"""The layer that ends lines as everybody does."""

MAX_VALUE_BYTES = 64 << 20
"""Of one JSON value that is not in a line of its own."""

_BLOCK = 1 << 16
_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_TOKEN = re.compile(_STRING + rb'|[{}\[\]]|"|[^\s,\x1e{}\[\]"]+', re.DOTALL)
_CLEAN = re.compile(rb"(" + _STRING + rb")|,(?=\s*[}\]])|\s*[\r\n]\s*", re.DOTALL)
"""Strings, commas before the end of a list or an object, and line ends between values."""


class RecodeError(OSError):
    """A file that is not what its beginning promised."""


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
    return cast(BinaryIO, io.BufferedReader(Stream(_Chunks(pieces), below), _BLOCK))


def _unicode(encoding: str) -> Callable[[BinaryIO], BinaryIO]:
    def pieces(file: BinaryIO) -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder(encoding)()
        try:
            while block := file.read(_BLOCK):
                yield decoder.decode(block).encode("utf-8")
            decoder.decode(b"", final=True)
        except UnicodeError as error:
            raise RecodeError(f"it begins as {encoding.upper()} and is not: {error}") from error

    return lambda file: _stream(pieces(file), file)


def _end_lines(file: BinaryIO) -> BinaryIO:
    return _stream((piece.replace(b"\r", b"\n") for piece in iter(lambda: file.read(_BLOCK), b"")), file)


def _open_values(file: BinaryIO) -> BinaryIO:
    return _stream((value + b"\n" for value in split_values(file)), file)


def split_values(file: BinaryIO) -> Iterator[bytes]:
    """The JSON values of a file one after the other, each without line ends; those of a list at the top come singly.

    Raises:
        RecodeError: the last one does not end, or one is too large.
    """
    buffer, start, in_list, ended = file.read(_BLOCK).removeprefix(codecs.BOM_UTF8), 0, False, False
    while not ended:
        block = file.read(max(_BLOCK, len(buffer) - start))
        ended = not block
        buffer, start = buffer[start:] + block, 0
        depth = begin = 0
        for token in _TOKEN.finditer(buffer):
            word = token[0]
            if word == b'"' or (token.end() == len(buffer) and not ended and word not in b"{}[]"):
                break  # It may go on in the next block.
            if depth == 0:
                begin = token.start()
                if word in (b"[", b"]") and in_list == (word == b"]"):
                    in_list, start = not in_list, token.end()
                    continue
            depth += (word in (b"{", b"[")) - (word in (b"}", b"]"))
            if depth <= 0:
                yield _clean(buffer[begin : token.end()])
                depth, start = 0, token.end()
        if len(buffer) - start > MAX_VALUE_BYTES:
            raise RecodeError(f"a JSON value in it has more than {MAX_VALUE_BYTES >> 20} MB; write one object a line")
    if rest := buffer[start:].strip(b" \t\r\n,\x1e"):
        raise RecodeError(f"its last JSON value does not end: {rest[:40].decode('utf-8', 'replace')!r}...")


def _clean(value: bytes) -> bytes:
    """A value in one line, without commas behind the last part of a list or an object."""

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
