"""Text from JSON lines: one object a line, the text in one of its fields."""

import json
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from neobert.data.columns import choose_text_column
from neobert.data.errors import DataError
from neobert.data.files import DataFile, cannot_read
from neobert.data.lines import BOM, FAULTS, Entry, FileSource, build_file_source, drop_empty_files
from neobert.data.network import is_transient
from neobert.data.record_file import RecordFile
from neobert.data.spec import SourceSpec

COLUMN_SAMPLE = 100
"""Records whose fields are looked at to choose the column."""


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
    """One object a line."""

    def __init__(self, column: str) -> None:
        self._column = column

    def read(self, file: RecordFile, data_file: DataFile, start: int) -> Entry | None:
        line = file.read_line()
        if line is None:
            return None
        if line.problem is not None:
            return Entry(line.size, 1, None, line.problem)
        text, problem = parse_line(line.content if start else line.content.removeprefix(BOM), self._column)
        return Entry(line.size, 1, text, problem)


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
        record = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
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


def open_jsonl(files: Sequence[DataFile], spec: SourceSpec) -> FileSource:
    """Files of JSON lines, in the order given.

    Raises:
        DataError: there is no text column, or a file holds an array.
    """
    kept, notes = drop_empty_files(files, spec)
    text_columns: dict[str, None] = {}
    others: dict[str, None] = {}
    for record in _sample(kept, spec):
        for name, value in record.items():
            (text_columns if isinstance(value, str) else others)[name] = None
    column, note = choose_text_column(list(text_columns), list(others), spec.text_column, spec.label)
    return build_file_source(kept, JsonLines(column), [note, *notes], spec)


def _sample(files: Sequence[DataFile], spec: SourceSpec) -> list[dict[str, Any]]:
    """The first records that can be read."""
    found: list[dict[str, Any]] = []
    for data_file in files:
        try:
            with closing(RecordFile(data_file.open(), spec.max_record_bytes)) as file:
                for number, line in enumerate(iter(file.read_line, None)):
                    raw = line.content
                    if number == 0:
                        raw = raw.removeprefix(BOM)
                        _check_no_array(raw, data_file)
                    try:
                        record = json.loads(raw)
                    except (ValueError, RecursionError):
                        continue
                    if isinstance(record, dict):
                        found.append(record)
                    if len(found) == COLUMN_SAMPLE:
                        return found
        except FAULTS as error:
            if is_transient(error):
                raise
            if spec.on_bad_shard == "error":
                raise DataError(cannot_read(data_file, error)) from error
    return found


def _check_no_array(first_line: bytes, file: DataFile) -> None:
    if first_line.lstrip()[:1] == b"[":
        stem = file.name.split(".")[0]
        raise DataError(
            f"{file.url} holds one JSON array; one object a line is needed. Convert it, for example with "
            f"`jq -c '.[]' {file.name} > {stem}.jsonl`, and name the new file in dataset.path"
        )
