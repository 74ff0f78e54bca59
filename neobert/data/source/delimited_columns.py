"""Opening CSV and TSV files: which column holds the text, from the header and the first rows of each file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice

from neobert.data.source.delimited import DELIMITERS, Delimited, Header, read_header, read_rows
from neobert.data.source.files import DataFile, cannot_read
from neobert.data.source.intake import Inspected, inspect_files
from neobert.data.source.lines import FAULTS, FileSource, build_file_source
from neobert.data.source.network import is_transient
from neobert.data.source.spec import SourceSpec, choose_candidates, choose_text_column, is_believed
from neobert.data.source.text import ShardFault
from neobert.errors import DataError

_SAMPLE_ROWS = 100


@dataclass(kw_only=True, slots=True)
class _Cells:
    """Cells of the first rows that are neither blank nor a number, by column."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    numeric: set[str] = field(default_factory=set)
    """Columns with a number."""

    num_rows: int = 0

    def split(self, header: Header, requested: str | None) -> tuple[list[str], list[str]]:
        """Columns with text, and the others. One that is named or called text is believed unless it holds numbers."""
        believed = [c for c in header.columns if is_believed(c, requested) and c not in self.numeric]
        found = {*choose_candidates(self.texts, requested), *believed}
        return [c for c in header.columns if c in found], [c for c in header.columns if c not in found]


def open_delimited(files: Sequence[DataFile], spec: SourceSpec) -> FileSource:
    """CSV and TSV files, in the order given.

    Raises:
        DataError: there is no text column.
    """
    kept = inspect_files(files, spec)
    headers: dict[str, Header] = {}
    for file in kept:
        try:
            headers[file.url] = read_header(file, spec.text_column)
        except ShardFault:
            if spec.section.on_bad_shard == "error":
                raise
        except FAULTS as error:
            if is_transient(error):
                raise
            if spec.section.on_bad_shard == "error":
                raise DataError(cannot_read(file, error)) from error
    if not headers:
        raise DataError(f"dataset.path: no file of {spec.label} can be read; restore the files")
    column, note = _choose_usual(kept, headers, spec)
    own = _choose_own(kept, headers, column, spec)
    for url, header in headers.items():
        kept.report(url, column=own.get(url, column), columns=header.columns)
    return build_file_source(kept, Delimited(headers, column, own), [note, *_note_delimiters(headers)], spec)


def _choose_own(found: Inspected, headers: Mapping[str, Header], column: str, spec: SourceSpec) -> dict[str, str]:
    """The columns of the files that do not have `column`; files without any are left out where that is allowed.

    Raises:
        DataError: a file has no text column, and such files are not skipped.
    """
    own: dict[str, str] = {}
    problems: dict[str, str] = {}
    for file in found:
        if file.url not in headers or (header := headers[file.url]).columns.count(column) == 1:
            continue
        try:
            if spec.text_column is not None or column in header.columns:
                raise DataError("the column is decided")
            own[file.url] = choose_text_column(*_read_cells(file, header, spec).split(header, None), None, file.url)[0]
        except DataError as error:
            names = ", ".join(header.columns)
            problems[file.url] = f"has no column {column!r} (columns: {names})"
            if spec.section.on_bad_shard == "error":
                raise DataError(
                    f"dataset.path: the header of {file.url} is {names}; every file needs column {column!r}, once"
                ) from error
    found.drop(problems)
    return own


def _note_delimiters(headers: Mapping[str, Header]) -> list[str]:
    """What the headers say against the endings of the files."""
    counts = Counter(header.delimiter for header in headers.values() if header.is_guess)
    first = {d: next(url for url, header in headers.items() if header.delimiter == d) for d in counts}
    return [
        f"{DELIMITERS[delimiter]} between the columns of {first[delimiter]}"
        + (f" and {count - 1} more files" if count > 1 else "")
        + ", as the header has them"
        for delimiter, count in counts.items()
    ]


def _choose_usual(found: Inspected, headers: Mapping[str, Header], spec: SourceSpec) -> tuple[str, str]:
    """The column of most files: of the first one with rows in which there is one.

    Raises:
        DataError: no file has one, or a file has no row that can be read and such files are not skipped.
    """
    requested = spec.text_column
    choices, num_rows = [], 0
    for file in found:
        if (header := headers.get(file.url)) is None:
            continue
        try:
            cells = _read_cells(file, header, spec)
        except DataError:
            if spec.section.on_bad_shard == "error":
                raise
            continue  # Its sample says so again, and takes it out.
        choices.append(cells.split(header, requested))
        num_rows += cells.num_rows
        if cells.num_rows and choices[-1][0]:
            return choose_text_column(*choices[-1], requested, spec.label)
    if not num_rows:
        raise DataError(f"dataset.path: {spec.label} has no text: no file of it has a row that can be read")
    texts, others = ([name for choice in choices for name in choice[part]] for part in (0, 1))
    return choose_text_column(texts, list(dict.fromkeys(others)), requested, spec.label)


def _read_cells(file: DataFile, header: Header, spec: SourceSpec) -> _Cells:
    """The first rows of a file.

    Raises:
        DataError: no row has as many fields as the header.
    """
    cells, problems = _Cells(), list[str]()
    with closing(read_rows(file, header, spec.section.max_record_bytes)) as rows:
        for line, fields, problem in islice(rows, _SAMPLE_ROWS):
            if problem is not None:
                problems.append(f"{file.url}:{line}: {problem}")
            elif fields is not None:
                cells.num_rows += 1
                for name, value in zip(header.columns, fields):
                    if _is_number(value):
                        cells.numeric.add(name)
                    elif value.strip():
                        cells.texts.setdefault(name, []).append(value)
    if problems and not cells.num_rows:
        raise DataError(
            f"dataset.path: no row of {file.url} can be read with its header ({', '.join(header.columns)}), the first "
            f"one is {problems[0]}; correct the file"
        )
    return cells


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
