"""Plain text files: a document is a line, the lines between blank lines, or the whole file (`dataset.sample_by`).

Blank lines before a document and white space after it are left out, and Windows line ends become plain ones.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import BinaryIO

from neobert.data.files import DataFile
from neobert.data.intake import inspect_files
from neobert.data.inventory import Sample
from neobert.data.jsonl import Lines
from neobert.data.lines import BOM, Entry, FileSource, LineFormat, build_file_source, check_samples, sample_lines
from neobert.data.spec import SourceSpec

_LOOK_BACK = 1 << 16
_BORDER = re.compile(rb"\S[^\S\n]*\n[^\S\n]*\n\Z")
_BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")
_LINE_WITH_TEXT = re.compile(rb"\S[^\S\n]*\n\Z")


class TextLines(Lines):
    """A document is a line."""

    def read(self, file: BinaryIO, data_file: DataFile, start: int) -> Entry | None:
        raw = file.readline()
        return _entry(raw, 1, start) if raw else None


class Paragraphs:
    """A document is the lines up to a blank line. Its bytes begin behind the blank line before, and end with the first
    blank line after."""

    cuttable = True

    def align(self, file: BinaryIO, begin: int) -> int:
        file.seek(begin - 1)
        file.readline()
        place = file.tell()
        file.seek(max(0, place - _LOOK_BACK))
        before = file.read(place - file.tell())
        if _BORDER.search(before):
            return place
        in_text = bool(_LINE_WITH_TEXT.search(before))
        while line := file.readline():
            place += len(line)
            if not line.strip() and in_text:
                break
            in_text = bool(line.strip())
        return place

    def read(self, file: BinaryIO, data_file: DataFile, start: int) -> Entry | None:
        lines = self._lines(file)
        return _entry(b"".join(lines), len(lines), start) if lines else None

    def skip(self, file: BinaryIO, data_file: DataFile, start: int) -> Entry | None:
        lines = self._lines(file)
        return Entry(sum(map(len, lines)), len(lines)) if lines else None

    @staticmethod
    def _lines(file: BinaryIO) -> list[bytes]:
        lines: list[bytes] = []
        has_text = False
        while line := file.readline():
            lines.append(line)
            if not line.strip():
                if has_text:
                    break
            else:
                has_text = True
        return lines


class WholeFile:
    """A document is a file."""

    cuttable = False

    def align(self, file: BinaryIO, begin: int) -> int:
        file.seek(begin)
        return begin

    def read(self, file: BinaryIO, data_file: DataFile, start: int) -> Entry | None:
        raw = file.read()
        return _entry(raw, raw.count(b"\n") + (raw[-1:] != b"\n"), start) if raw else None

    skip = read


SAMPLE_BY: dict[str, LineFormat] = {"line": TextLines(), "paragraph": Paragraphs(), "document": WholeFile()}


def open_text(files: Sequence[DataFile], spec: SourceSpec) -> FileSource:
    """Plain text files, in the order given.

    Raises:
        DataError: a file has no text.
    """
    found = inspect_files(files, spec)
    check_samples(found, _sample)
    others = ", ".join(word for word in SAMPLE_BY if word != spec.sample_by)
    unit = "file" if spec.sample_by == "document" else spec.sample_by
    note = f"one document a {unit} of plain text (dataset.sample_by: {spec.sample_by}; or {others})"
    return build_file_source(found, SAMPLE_BY[spec.sample_by], [note], spec)


@lru_cache(maxsize=1 << 14)
def _sample(file: DataFile) -> Sample:
    return sample_lines(file, TextLines())  # Whatever a document is: lines tell the encoding.


def _entry(raw: bytes, num_lines: int, start: int) -> Entry:
    content = raw if start else raw.removeprefix(BOM)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        return Entry(len(raw), num_lines, None, str(error), content.count(b"\n", 0, error.start) + 1)
    text = _BLANK_LINES.sub("", text.replace("\r\n", "\n"), count=1).rstrip()
    return Entry(len(raw), num_lines, text or None)
