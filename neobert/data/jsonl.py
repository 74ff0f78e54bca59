"""JSON lines: one object a line, the text in one of its fields. `json_columns.py` chooses the field."""

from collections.abc import Callable
from typing import Any

from neobert.config.nesting import parse_json
from neobert.data.files import DataFile
from neobert.data.lines import BOM, Entry
from neobert.data.record_file import RecordFile


class Lines:
    """What formats of one record a line have in common."""

    cuttable = True

    def align(self, file: RecordFile, begin: int) -> int:
        # The line that reaches over `begin` belongs to the range before; one byte back, in case a line ends there.
        file.seek(begin - 1)
        file.read_line()
        return file.tell()

    def skip(self, file: RecordFile, data_file: DataFile, start: int) -> Entry | None:
        line = file.read_line()
        return None if line is None else Entry(line.size, 1)


class JsonLines(Lines):
    """One object a line, the text in `column`, or where `column_of` says for a file."""

    def __init__(self, column: str, column_of: Callable[[DataFile], str] | None = None) -> None:
        self._column, self._column_of = column, column_of
        self._columns: dict[str, str] = {}

    def read(self, file: RecordFile, data_file: DataFile, start: int) -> Entry | None:
        line = file.read_line()
        if line is None:
            return None
        if line.problem is not None:
            return Entry(line.size, 1, None, line.problem)
        text, problem = self.parse(line.content if start else line.content.removeprefix(BOM), data_file)
        return Entry(line.size, 1, text, problem)

    def parse(self, raw: bytes, data_file: DataFile) -> tuple[str | None, str | None]:
        """(text, problem) of a line."""
        column = self._column
        if self._column_of is not None:
            found = self._columns.get(data_file.url)
            column = found or self._columns.setdefault(data_file.url, self._column_of(data_file))
        return parse_line(raw, column)


def parse_line(raw: bytes, column: str) -> tuple[str | None, str | None]:
    """(text, problem) of a line; both None when it is blank or has no text."""
    record, problem = parse_object(raw)
    text = None if record is None else record.get(column)
    if not isinstance(text, str) or not text.strip():
        return None, problem
    problem = find_surrogate(text)
    return (text, None) if problem is None else (None, problem)


def parse_object(raw: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """(object, problem) of a line; both None when it is blank."""
    if not raw.strip():
        return None, None
    try:
        record = parse_json(raw.decode("utf-8"))
    except ValueError as error:
        return None, str(error)
    if not isinstance(record, dict):
        return None, f"a JSON object was expected, not {type(record).__name__}"
    return record, None


def find_surrogate(text: str) -> str | None:
    """What is wrong with a text that no file can hold; None when nothing is."""
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError:
        return "the text holds half of a surrogate pair"
    return None
