"""CSV and TSV: a header line with the names of the columns, then a record each, over several lines where it is quoted.

A line end may stand inside of quotes, so only reading from the beginning tells where records begin: these files are
never cut into byte ranges.
"""

import csv
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from neobert.data.columns import choose_text_column
from neobert.data.errors import DataError
from neobert.data.files import DataFile, cannot_read
from neobert.data.intake import inspect_files
from neobert.data.lines import BOM, FAULTS, Entry, FileSource, build_file_source
from neobert.data.network import is_transient
from neobert.data.spec import SourceSpec
from neobert.data.text import ShardFault

_MAX_FIELD_CHARS = 1 << 26

# The limit is one of the process. Its default, 131072, is less than many a document.
csv.field_size_limit(_MAX_FIELD_CHARS)


class Delimited:
    """Records of a file whose first one is the header. The header belongs to the bytes of the first record after it."""

    cuttable = False

    def __init__(self, headers: dict[str, list[str]], column: str) -> None:
        self._headers, self._column = headers, column

    def align(self, file: BinaryIO, begin: int) -> int:
        file.seek(begin)
        return begin

    def read(self, file: BinaryIO, data_file: DataFile, start: int) -> Entry | None:
        lines = _Lines(file, start)
        if not start:
            _read_record(lines, data_file)
        before, lines.problem = lines.count, None
        fields, problem = _read_record(lines, data_file)
        if fields is None:
            return None
        text = None
        if problem is None and fields:
            header = self._header(data_file)
            if len(fields) == len(header):
                text = fields[header.index(self._column)]
            else:
                problem = f"{len(fields)} fields, and the header has {len(header)}"
        line = before + 1 if lines.problem is None else lines.bad_line
        return Entry(lines.size, lines.count, text if text and text.strip() else None, problem, line)

    skip = read

    def _header(self, file: DataFile) -> list[str]:
        if file.url not in self._headers:
            self._headers[file.url] = read_header(file)
        header = self._headers[file.url]
        if self._column not in header:
            raise ShardFault(f"{file.url} has no column {self._column!r} in its header")
        return header


class _Lines:
    """Lines of text for the csv module, which asks for as many as a record has."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file, self._start = file, start
        self.size = self.count = self.bad_line = 0
        self.problem: str | None = None

    def __iter__(self) -> Iterator[str]:
        while raw := self._file.readline():
            content = raw if self._start or self.size else raw.removeprefix(BOM)
            self.size, self.count = self.size + len(raw), self.count + 1
            try:
                yield content.decode("utf-8")
            except UnicodeDecodeError as error:
                self.problem, self.bad_line = str(error), self.count
                yield content.decode("utf-8", "replace")


def _read_record(lines: _Lines, file: DataFile) -> tuple[list[str] | None, str | None]:
    """(fields, problem); no fields for a blank line, None at the end of the file."""
    delimiter = "\t" if ".tsv" in file.name.lower() else ","
    try:
        fields = next(csv.reader(lines, delimiter=delimiter, strict=True), None)
    except csv.Error as error:
        return [], str(error)
    return fields, lines.problem


def read_header(file: DataFile) -> list[str]:
    """Names of the columns of a file; none when it is empty."""
    with file.open() as opened:
        fields, problem = _read_record(_Lines(opened, 0), file)
    if problem is not None:
        raise DataError(f"{file.url}:1: the header cannot be read: {problem}; mend the file")
    return fields or []


def open_delimited(files: Sequence[DataFile], spec: SourceSpec) -> FileSource:
    """CSV and TSV files, in the order given.

    Raises:
        DataError: there is no text column.
    """
    kept = inspect_files(files, spec)
    headers: dict[str, list[str]] = {}
    for file in kept:
        try:
            headers[file.url] = read_header(file)
        except FAULTS as error:
            if is_transient(error):
                raise
            if spec.on_bad_shard == "error":
                raise DataError(cannot_read(file, error)) from error
    first = next((file for file in kept if file.url in headers), None)
    if first is None:
        raise DataError(f"dataset.path: no file of {spec.label} can be read; restore the files")
    column, note = choose_text_column(*_columns(first, headers[first.url]), spec.text_column, spec.label)
    for url, header in headers.items():
        if header.count(column) != 1:
            raise DataError(
                f"dataset.path: the header of {url} is {', '.join(header)}; every file needs column {column!r}, once"
            )
    return build_file_source(kept, Delimited(headers, column), [note], spec)


def _columns(file: DataFile, columns: list[str]) -> tuple[list[str], list[str]]:
    """Columns with text, and the others: the ones whose first records are all numbers or empty."""
    texts: dict[str, None] = {}
    with file.open() as opened:
        offset = 0
        for _ in range(101):
            lines = _Lines(opened, offset)
            fields, problem = _read_record(lines, file)
            if fields is None:
                break
            if offset and problem is None and len(fields) == len(columns):
                texts |= {name: None for name, value in zip(columns, fields) if value.strip() and not _is_number(value)}
            offset += lines.size
    return [name for name in columns if name in texts], [name for name in columns if name not in texts]


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
