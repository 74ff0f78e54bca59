"""CSV and TSV: a header line with the names of the columns, then a row each.

The header shows what separates the columns: a comma, a semicolon, a tab or a bar. A row may go over several lines where
a field is quoted (RFC 4180), so only reading from the start shows where rows begin: these files are never cut into
byte ranges. How a row is read depends on nothing but the bytes from its start on:

| the row | is |
|---|---|
| quoted as in RFC 4180, as many fields as columns | a row, over as many lines as it has |
| a quotation mark that is not closed, or closed in the middle of a field | a bad record of one line |
| a closed quote around lines that are rows themselves (`_is_swallowed`) | a bad record of one line |
| quoted well, with another number of fields | a bad record |

So a stray quotation mark costs one line, and reading continues at the next one. Between tabs it costs nothing: where
the quotes do not make a row, the line is read as it is.
"""

import csv
import re
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from neobert.data.source.files import DataFile
from neobert.data.source.lines import BOM, Entry
from neobert.data.source.record_file import Line, RecordFile
from neobert.data.source.text import ShardFault, TooLong

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""What may separate columns."""

_SAMPLE_ROWS = 100
_HEAD_BYTES = 1 << 20
_NAMED_BY_EXCEL = re.compile(r"sep=([,;\t|])")
"""A line before the header that says what separates the columns."""

_QUOTED_CELL = re.compile(r'"(?:[^"]|"")*"([,;\t|])')
"""A quoted name of a column, and what comes after it."""

_MANY_LINES = 16
"""A row that is well formed and shorter than this is believed, whatever its lines look like."""

_FEW_LINES = 4
"""Between tabs, so many lines that are rows are rows, whatever quotation marks are in them."""

_ROW_FRACTION = 0.9
"""Of the lines in a quoted field: so many that are rows by themselves are rows."""

# The limit is one of the process; how large a record may be is `dataset.max_record_bytes`.
csv.field_size_limit(sys.maxsize)


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The columns of a file, and how they are written."""

    columns: tuple[str, ...]
    delimiter: str
    num_lines: int
    """Lines before the first row."""

    is_guess: bool = False
    """Whether the delimiter is another one than the ending of the file says."""

    def split(self, line: str) -> list[str]:
        """The fields of a line in which quotation marks mean nothing."""
        return _split(line, self.delimiter)

    def fit(self, fields: list[str]) -> list[str]:
        """The fields without an empty one after the last delimiter, where that is one more than the columns."""
        return fields[:-1] if len(fields) == len(self.columns) + 1 and not fields[-1] else fields


class Row(NamedTuple):
    """A row as it is in a file."""

    size: int
    """Bytes."""

    num_lines: int
    fields: list[str] | None = None
    """As many as there are columns; None for a blank line, and where there is a problem."""

    problem: str | None = None
    line: int = 1
    """The line of the row, from 1, that the problem is in."""


class Delimited:
    """Records of a file whose first one is the header. The header belongs to the bytes of the first record after it."""

    cuttable = False

    def __init__(self, headers: dict[str, Header], column: str, own: Mapping[str, str] = MappingProxyType({})) -> None:
        """
        Args:
            own: the columns of files that have another one than `column`.
        """
        self._headers, self._column, self._own = headers, column, own

    def align(self, file: RecordFile, begin: int) -> int:
        file.seek(begin)
        return begin

    def read(self, file: RecordFile, data_file: DataFile, start: int) -> Entry | None:
        header = self._header(data_file)
        size, num_lines = (0, 0) if start else _skip_lines(file, header.num_lines)
        row = read_row(file, header)
        if row is None:
            return None
        text = row.fields and row.fields[header.columns.index(self._own.get(data_file.url, self._column))]
        usable = text if text and text.strip() else None
        return Entry(size + row.size, num_lines + row.num_lines, usable, row.problem, num_lines + row.line)

    skip = read

    def _header(self, file: DataFile) -> Header:
        if file.url not in self._headers:
            self._headers[file.url] = read_header(file, self._column)
        header = self._headers[file.url]
        if (column := self._own.get(file.url, self._column)) not in header.columns:
            raise ShardFault(f"{file.url} has no column {column!r} in its header")
        return header


def read_row(file: RecordFile, header: Header) -> Row | None:
    """The next row of a file that is after a row, or after the header; None at its end."""
    first = file.read_line()
    if first is None:
        return None
    if first.problem is not None or not first.content.strip():
        return Row(first.size, 1, None, first.problem)
    row, problem = _RowLines(file, first), None
    try:
        fields = header.fit(next(csv.reader(row, delimiter=header.delimiter, strict=True)))
    except csv.Error as error:
        fields, problem = [], row.describe(error)
    fits = len(fields) == len(header.columns)
    if problem is None and _is_swallowed(row.texts, header, fits):
        problem = f"a quoted field spans {len(row.lines)} lines that are rows themselves"
    if problem is None and (fits or row.problem is not None):
        return Row(row.size, len(row.lines), None if row.problem else fields, row.problem, row.bad_line)
    if row.bad_line == 1:
        return row.keep_first_line(None, row.problem)
    literal = header.fit(header.split(row.texts[0]))
    if header.delimiter == "\t" and len(literal) == len(header.columns):
        return row.keep_first_line(literal)
    if problem is not None:
        return row.keep_first_line(None, problem)
    problem = f"{len(fields)} fields, and the header has {len(header.columns)}"
    return Row(row.size, len(row.lines), None, problem)


def read_rows(
    file: DataFile, header: Header, max_record_bytes: int
) -> Generator[tuple[int, list[str] | None, str | None], None, None]:
    """(line, fields, problem) of every row of a file; neither fields nor problem for a blank line."""
    with closing(RecordFile(file.open(), max_record_bytes)) as opened:
        _, line = _skip_lines(opened, header.num_lines)
        while (row := read_row(opened, header)) is not None:
            yield line + row.line, row.fields, row.problem
            line += row.num_lines


class _RowLines:
    """The lines of a row for the csv module, which asks for as many as the row has."""

    def __init__(self, file: RecordFile, first: Line) -> None:
        self._file = file
        self.lines = [first]
        self.texts: list[str] = []
        self.size = 0
        self.bad_line = 0
        self.problem: str | None = None
        """What cannot be decoded in line `bad_line`, from 1."""

        self._is_cut = False
        self._is_open = False
        """Whether the csv module asked for a line after the first one."""

    def __iter__(self) -> Iterator[str]:
        line: Line | None = self.lines[0]
        while line is not None:
            self.size += line.size
            if self.size > self._file.max_record_bytes:
                self._is_cut = True
                return
            self.texts.append(self._decode(line.content))
            yield self.texts[-1]
            self._is_open = True
            line = self._file.read_line()
            self.lines += [] if line is None else [line]

    def _decode(self, content: bytes) -> str:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.problem is None:
                self.problem, self.bad_line = str(error), len(self.lines)
            return content.decode("utf-8", "replace")

    def describe(self, error: csv.Error) -> str:
        """What is wrong with the quotation marks."""
        reason = str(TooLong(self.size, self._file.max_record_bytes)) if self._is_cut else str(error)
        return f"a quotation mark that is not closed ({reason})" if self._is_open else reason

    def keep_first_line(self, fields: list[str] | None, problem: str | None = None) -> Row:
        """The row is its first line alone; the others are read again."""
        self._file.unread(self.lines[1:])
        return Row(self.lines[0].size, 1, fields, problem)


def _is_swallowed(lines: Sequence[str], header: Header, fits: bool) -> bool:
    """Whether the lines of a well-formed row are rows themselves, brought together by two stray quotation marks.

    Between tabs quotes are the exception, elsewhere the rule. There a row that fits the header is believed unless it is
    long, and so is a text with doubled quotation marks, which was quoted on purpose. A TSV of one column is its lines.
    """
    is_rule = header.delimiter != "\t"
    if len(lines) < 2 or (fits and is_rule and (len(header.columns) == 1 or len(lines) < _MANY_LINES)):
        return False
    if (is_rule or len(lines) < _FEW_LINES) and any('""' in line for line in lines):
        return False
    are_rows = [len(header.split(line)) == len(header.columns) for line in lines]
    inner = are_rows[1:-1] or are_rows[1:]  # What follows the closing quotation mark says nothing about the others.
    return are_rows[0] and sum(inner) >= _ROW_FRACTION * len(inner)


def _skip_lines(file: RecordFile, count: int) -> tuple[int, int]:
    """Reads over lines; (bytes, lines)."""
    lines = [line for _ in range(count) if (line := file.read_line()) is not None]
    return sum(line.size for line in lines), len(lines)


def read_header(file: DataFile, requested: str | None = None) -> Header:
    """The columns of a file; none when it is empty.

    Args:
        requested: a column that is there, whatever its name looks like.

    Raises:
        ShardFault: the header cannot be read, or does not show what separates the columns.
    """
    usual = delimiter = "\t" if ".tsv" in file.name.lower() else ","
    lines = _read_head(file)
    begin = next((number for number, line in enumerate(lines) if line.strip()), len(lines))
    if begin < len(lines) and (named := _NAMED_BY_EXCEL.fullmatch(lines[begin].rstrip("\r\n"))) is not None:
        delimiter, begin = named[1], begin + 1
    elif begin < len(lines) and (quoted := _QUOTED_CELL.match(lines[begin])) is not None:
        delimiter = quoted[1]
    columns, num_lines = _parse_header(file, lines[begin:], delimiter)
    if len(columns) == 1 and columns[0] != requested:
        delimiter = _guess_delimiter(file, columns[0], lines[begin + num_lines :], delimiter)
        columns, num_lines = _parse_header(file, lines[begin:], delimiter)
    return Header(columns=columns, delimiter=delimiter, num_lines=begin + num_lines, is_guess=delimiter != usual)


def _read_head(file: DataFile) -> list[str]:
    """The first lines of a file."""
    with closing(RecordFile(file.open(), _HEAD_BYTES)) as opened:
        lines: list[str] = []
        size = 0
        while len(lines) <= _SAMPLE_ROWS and size < _HEAD_BYTES and (line := opened.read_line()) is not None:
            if line.problem is not None and not lines:
                raise ShardFault(f"{file.url}:1: the header cannot be read: {line.problem}; correct the file")
            content, size = line.content if lines else line.content.removeprefix(BOM), size + line.size
            # What cannot be decoded is a lone surrogate here, and no name.
            lines.append(content.decode("utf-8", "surrogateescape"))
    return lines


def _parse_header(file: DataFile, lines: Sequence[str], delimiter: str) -> tuple[tuple[str, ...], int]:
    """The names of the columns, and the number of lines that they are in."""
    if not lines:
        return (), 0
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        columns = tuple(next(reader))
        "".join(columns).encode("utf-8")
    except (csv.Error, UnicodeEncodeError) as error:
        if isinstance(error, csv.Error) and delimiter == "\t":
            return tuple(_split(lines[0], delimiter)), 1
        raise ShardFault(f"{file.url}:1: the header cannot be read: {error}; correct the file") from error
    return columns, reader.line_num


def _guess_delimiter(file: DataFile, cell: str, rows: Sequence[str], usual: str) -> str:
    """What separates the columns of a file whose header would be one cell.

    Raises:
        ShardFault: the rows do not match the header.
    """
    found: dict[str, float] = {}
    for delimiter in DELIMITERS:
        if delimiter != usual and (count := len(_split(cell, delimiter))) > 1:
            sizes = [len(fields) for fields in csv.reader(rows, delimiter=delimiter) if fields]
            found[delimiter] = sizes.count(count) / len(sizes) if sizes else 1.0
    if not found:
        return usual
    best = max(found, key=lambda delimiter: found[delimiter])
    if found[best] < 0.5:
        raise ShardFault(
            f"{file.url}: the header is one cell, {cell!r}, and its rows are not separated as it is; give the column a "
            "name without separators, or name it with dataset.text_column"
        )
    return best


def _split(line: str, delimiter: str) -> list[str]:
    return line.rstrip("\r\n").split(delimiter)
