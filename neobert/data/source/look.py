"""What the first bytes of a file say: compression, encoding and form of its text, or why there is none in it.

The name of a file says which format it has; that its content is something else is either read (gzip content without
.gz, UTF-16 with its mark, a JSON list, old line ends) or named with the remedy, never read as text.
"""

import codecs
import io
import re
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

from neobert.config.nesting import parse_json
from neobert.data.source.codecs import (
    CARRIAGE_RETURNS,
    DAMAGED,
    VALUES,
    codec_of_content,
    codec_of_name,
    open_layers,
    split_values,
)
from neobert.data.source.files import DataFile, cannot_read, kind_of_name

HEAD_BYTES = 1 << 16
"""Of every file, decompressed."""

MAX_LINES = 100

_MAX_LAYERS = 3
_LONG_LINE = 8 << 20
_VALUE_BYTES = 4 << 20
_PIECE = 4096
_PARQUET = b"PAR1"
_POINTER = re.compile(rb"version https://(?:git-lfs|hawser)\.github\.com/spec/")
_ANNEX = re.compile(rb"\S*annex/objects/\S+\s*\Z")
_PAGE = re.compile(
    rb"(?:<\?xml[^>]*\?>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)[\s>]", re.IGNORECASE | re.DOTALL
)
_ANSWER = re.compile(rb"(?:<\?xml[^>]*\?>\s*)?<Error>\s*<Code>")
_TAR_OFFSET = 257
_OTHERS = {
    b"PK\x03\x04": "a zip archive",
    b"%PDF-": "a PDF file",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a": "a RAR archive",
    b"ARROW1\0\0": "an Arrow file",
    _PARQUET: "a Parquet file",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x80\x04\x95": "a pickle",
}
_MARKS = {  # UTF-32 first: it starts as UTF-16 does.
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class Look(NamedTuple):
    """What was seen."""

    content: tuple[str, ...]
    """How the bytes become lines of UTF-8: codecs and recoders, outermost first."""

    problem: str | None = None
    """Why it has no text of its format, as the end of a sentence that starts with its name."""

    is_empty: bool = False
    is_blank: bool = False
    """Only white space, not nothing."""

    damage: str | None = None
    """It starts well and cannot be read to the end of the first bytes."""


@lru_cache(maxsize=1 << 18)
def look(file: DataFile) -> Look:
    """Looks into a file whose name says a format.

    Raises:
        OSError: it cannot be opened.
    """
    kind = kind_of_name(file.name)
    with file.open_raw() as opened:
        raw = opened.read(HEAD_BYTES)
    if not raw:
        return Look((), is_empty=True)
    problem = _not_the_file(raw, file.size)
    if problem is None and kind == "Parquet":
        problem = _not_parquet(raw)
    if problem is not None or kind == "Parquet":
        return Look((), problem)
    expected, found = codec_of_name(file.url), codec_of_content(raw)
    if expected is not None and found != expected:
        reason = f"is not {expected}, as its name says: it starts with {_quote(raw)}"
        return Look((), f"{reason}; rename it, or fetch it again")
    return _look_inside(file, kind, raw)


def _look_inside(file: DataFile, kind: str | None, head: bytes) -> Look:
    """The layers of a file that is text, or should be."""
    layers: list[str] = []
    damage = None
    while (codec := codec_of_content(head)) is not None and len(layers) < _MAX_LAYERS:
        layers.append(codec)
        head, damage = _read_head(file, layers)
    if damage is not None or not head:
        return Look(tuple(layers), is_empty=damage is None, damage=damage)
    problem = _not_the_file(head, file.size) or _other_kind(head)
    if problem is not None:
        return Look(tuple(layers), problem)
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    if encoding is not None:
        layers.append(encoding)
        head, damage = _read_head(file, layers)
    elif (problem := _no_characters(head)) is not None:
        return Look(tuple(layers), problem)
    if not head.removeprefix(codecs.BOM_UTF8).strip():
        is_whole = len(head) < HEAD_BYTES and damage is None
        return Look(tuple(layers), is_blank=is_whole, damage=damage)
    if kind == "JSON":
        layers += _json_layers(file, layers, head)
    elif b"\n" not in head and b"\r" in head.rstrip(b"\r"):
        layers.append(CARRIAGE_RETURNS)
    return Look(tuple(layers), _not_utf8(file, head) if kind == "CSV" else None, damage=damage)


def _read_head(file: DataFile, layers: list[str]) -> tuple[bytes, str | None]:
    with open_layers(file.open_raw(), layers) as opened:
        head, error = _read_up_to(opened, HEAD_BYTES)
    return head, None if error is None else cannot_read(file, error)


def _read_up_to(file: BinaryIO, size: int) -> tuple[bytes, BaseException | None]:
    """The first bytes, as many as can be read, and what stopped it."""
    head = bytearray()
    try:
        while len(head) < size and (piece := file.read(min(_PIECE, size - len(head)))):
            head += piece
    except (*DAMAGED, OSError) as error:
        if not head and not isinstance(error, DAMAGED):
            raise
        return bytes(head), error
    return bytes(head), None


def _not_the_file(head: bytes, size: int) -> str | None:
    """What was saved instead of data that was not fetched."""
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if _POINTER.match(start) and size < 1024:
        return "is a Git LFS pointer, not the file; `git lfs pull` fetches it"
    if size < _PIECE and _ANNEX.match(head):
        return "is a git-annex pointer, not the file; `git annex get` fetches it"
    if _PAGE.match(start) or _ANSWER.match(start):
        return "is a web page, not data (a login or an error may have been saved instead); fetch it again"
    return None


def _not_parquet(head: bytes) -> str | None:
    if head.startswith((_PARQUET, b"PARE")):
        return None
    codec = codec_of_content(head)
    known = f"{codec} content" if codec is not None else _name_magic(head)
    found = f"is {known}" if known else f"starts with {_quote(head)}"
    return f"is no Parquet file: it {found}; fetch it again, or rename it"


def _other_kind(head: bytes) -> str | None:
    known = _name_magic(head)
    return None if known is None else f"is {known}, not text; unpack or convert it"


def _name_magic(head: bytes) -> str | None:
    if head[_TAR_OFFSET:].startswith(b"ustar"):
        return "a tar archive"
    return next((name for magic, name in _OTHERS.items() if head.startswith(magic)), None)


def _no_characters(head: bytes) -> str | None:
    """Why bytes with many zeros are no UTF-8."""
    num_zeros, half = head.count(0), max(1, len(head) // 2)
    if 10 * num_zeros < len(head):
        return None
    if num_zeros == len(head):
        return "holds only zero bytes; it was not written to its end: fetch it again"
    for name, first in (("UTF-16LE", 1), ("UTF-16BE", 0)):
        if 2 * head[first::2].count(0) > half > 10 * head[1 - first :: 2].count(0):
            return f"is {name} without its mark; convert it: iconv -f {name} -t UTF-8"
    return "is binary data, not text"


def _not_utf8(file: DataFile, head: bytes) -> str | None:
    """Why no row of CSV can be decoded."""
    rows = head.replace(b"\r", b"\n").split(b"\n", MAX_LINES)[1:MAX_LINES]
    rows = [row for row in rows if row.strip()]
    for number, row in enumerate(rows, start=2):
        try:
            row.decode("utf-8")
            return None
        except UnicodeDecodeError as error:
            reason = f"line {number}: {error}"
    if not rows:
        return None
    return f"has no text: none of its first rows is UTF-8, {reason}; {remedy_for_latin1(file)}"


def remedy_for_latin1(file: DataFile) -> str:
    """What to do with text that is not UTF-8."""
    return f"write UTF-8; where it is Latin-1: iconv -f ISO-8859-1 -t UTF-8 {file.name} > NEW_FILE"


def _json_layers(file: DataFile, layers: list[str], head: bytes) -> list[str]:
    """The layer that is needed where JSON is not one object a line."""
    lines = _first_lines(file, layers, head)
    num_good = sum(isinstance(_parse_any(line), dict) for line in lines)
    if lines and 2 * num_good >= len(lines):
        return []
    values: list[Any] = []
    with open_layers(file.open_raw(), layers) as opened:
        start = io.BytesIO(_read_up_to(opened, _VALUE_BYTES)[0])
    with suppress(OSError):  # The start ends in the middle of a value.
        values.extend(_parse_any(value) for value in islice(split_values(start), MAX_LINES))
    num_objects = sum(isinstance(value, dict) for value in values)
    is_list = not values and head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    return [VALUES] if is_list or (num_objects > num_good and 2 * num_objects > len(values)) else []


def _first_lines(file: DataFile, layers: list[str], head: bytes) -> list[bytes]:
    """The first lines, whole ones."""
    lines = head.removeprefix(codecs.BOM_UTF8).split(b"\n")
    if len(head) >= HEAD_BYTES:
        lines.pop()
    lines = [line for line in lines if line.strip()][:MAX_LINES]
    if not lines:
        with open_layers(file.open_raw(), layers) as opened:
            line = opened.readline(_LONG_LINE).removeprefix(codecs.BOM_UTF8)
        lines = [line] if len(line) < _LONG_LINE else []
    return lines


def _parse_any(raw: bytes) -> Any:
    """A JSON value, whatever its encoding, so that text in another one is named as that; None where there is none."""
    try:
        return parse_json(raw.decode("utf-8", "replace"))
    except ValueError:
        return None


def _quote(head: bytes) -> str:
    return repr(head[:16])[1:]
