"""Plain text files: a document is a line, the lines between blank lines, or the whole file (`dataset.sample_by`).

Blank lines before a document and white space after it are left out, and Windows line ends become plain ones.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from neobert.data.source.files import DataFile
from neobert.data.source.intake import inspect_files
from neobert.data.source.inventory import Sample
from neobert.data.source.jsonl import Lines
from neobert.data.source.lines import BOM, Entry, FileSource, LineFormat, build_file_source, check_samples, sample_lines
from neobert.data.source.record_file import Line, RecordFile
from neobert.data.source.spec import SourceSpec
from neobert.data.source.text import TooLong

_LOOK_BACK = 1 << 16
_BORDER = re.compile(rb"\S[^\S\n]*\n[^\S\n]*\n\Z")
_BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")
_LINE_WITH_TEXT = re.compile(rb"\S[^\S\n]*\n\Z")


class TextLines(Lines):
    """A document is a line."""

    def read(self, file: RecordFile, data_file: DataFile, start: int) -> Entry | None:
        line = file.read_line()
        return None if line is None else _entry(line, 1, start)


class Paragraphs:
    """A document is the lines up to a blank line. Its bytes begin after the blank line before, and end with the first
    blank line after."""

    cuttable = True

    def align(self, file: RecordFile, begin: int) -> int:
        file.seek(begin - 1)
        file.read_line()
        position = file.tell()
        file.seek(max(0, position - _LOOK_BACK))
        before = file.read(position - file.tell())
        if _BORDER.search(before):
            return position
        in_text = bool(_LINE_WITH_TEXT.search(before))
        while (line := file.read_line()) is not None:
            position += line.size
            if _is_blank(line) and in_text:
                break
            in_text = not _is_blank(line)
        return position

    def read(self, file: RecordFile, data_file: DataFile, start: int) -> Entry | None:
        whole, num_lines = self._join_lines(file)
        return _entry(whole, num_lines, start) if num_lines else None

    def skip(self, file: RecordFile, data_file: DataFile, start: int) -> Entry | None:
        whole, num_lines = self._join_lines(file)
        return Entry(whole.size, num_lines) if num_lines else None

    @staticmethod
    def _join_lines(file: RecordFile) -> tuple[Line, int]:
        """The next paragraph as one line, and the number of its lines."""
        contents: list[bytes] = []
        size = num_lines = 0
        has_text = False
        while (line := file.read_line()) is not None:
            size, num_lines = size + line.size, num_lines + 1
            if size <= file.max_record_bytes:
                contents.append(line.content)
            else:
                contents.clear()
            if _is_blank(line):
                if has_text:
                    break
            else:
                has_text = True
        if size > file.max_record_bytes:
            return Line(b"", size, str(TooLong(size, file.max_record_bytes))), num_lines
        return Line(b"".join(contents), size), num_lines


class WholeFile:
    """A document is a file."""

    cuttable = False

    def align(self, file: RecordFile, begin: int) -> int:
        file.seek(begin)
        return begin

    def read(self, file: RecordFile, data_file: DataFile, start: int) -> Entry | None:
        found = file.read_rest()
        return None if found is None else _entry(*found, start)

    skip = read


SAMPLE_BY: dict[str, LineFormat] = {"line": TextLines(), "paragraph": Paragraphs(), "document": WholeFile()}


def open_text(files: Sequence[DataFile], spec: SourceSpec) -> FileSource:
    """Plain text files, in the order given.

    Raises:
        DataError: a file has no text.
    """
    found = inspect_files(files, spec)
    check_samples(found, lambda file: _sample(file, spec.section.max_record_bytes))
    others = ", ".join(value for value in SAMPLE_BY if value != spec.section.sample_by)
    unit = "file" if spec.section.sample_by == "document" else spec.section.sample_by
    note = f"one document a {unit} of plain text (dataset.sample_by: {spec.section.sample_by}; or {others})"
    return build_file_source(found, SAMPLE_BY[spec.section.sample_by], [note], spec)


@lru_cache(maxsize=1 << 14)
def _sample(file: DataFile, max_record_bytes: int) -> Sample:
    return sample_lines(file, TextLines(), max_record_bytes)  # Whatever a document is: lines show the encoding.


def _is_blank(line: Line) -> bool:
    return line.problem is None and not line.content.strip()


def _entry(line: Line, num_lines: int, start: int) -> Entry:
    if line.problem is not None:
        return Entry(line.size, num_lines, None, line.problem)
    content = line.content if start else line.content.removeprefix(BOM)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        return Entry(line.size, num_lines, None, str(error), content.count(b"\n", 0, error.start) + 1)
    text = _BLANK_LINES.sub("", text.replace("\r\n", "\n"), count=1).rstrip()
    return Entry(line.size, num_lines, text or None)
