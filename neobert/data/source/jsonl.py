"""Opening files of JSON lines: which column holds the text, decided for each file.

Most files have the column that the first records of the source have. A file without a text in it has its own choice, by
the same rule; where that cannot be made, there is no text in the file, and its columns are named.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from neobert.config.nesting import parse_json
from neobert.data.source.files import DataFile
from neobert.data.source.intake import Inspected, inspect_files
from neobert.data.source.inventory import Sample
from neobert.data.source.lines import (
    BOM,
    Entry,
    FileShard,
    FileSource,
    build_file_source,
    describe_cause,
    is_hopeless,
    read_samples,
    sample_lines,
)
from neobert.data.source.record_file import RecordFile
from neobert.data.source.spec import TEXT_COLUMNS, SourceSpec, choose_candidates, choose_text_column
from neobert.data.source.text import ShardFault
from neobert.errors import DataError


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


COLUMN_SAMPLE = 100
"""First records of the source, whose fields are looked at to choose the column."""

_RECORDS = "list of objects"
_EXAMPLES = 20
_EXAMPLE_CHARS = 200
_SEARCH_BYTES = 1 << 26
_SEARCH_REMOTE_BYTES = 1 << 22


@dataclass(kw_only=True, slots=True)
class Fields:
    """The fields of some records."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    """Strings by field, the first ones."""

    others: dict[str, str] = field(default_factory=dict)
    """Fields with other values, and the kind of one."""

    counts: dict[str, int] = field(default_factory=dict)
    """Texts that are not blank, by field."""

    num_objects: int = 0
    sample: Sample = field(default_factory=Sample)

    def add(self, record: dict[str, Any]) -> None:
        """Takes note of an object."""
        self.num_objects += 1
        for name, value in record.items():
            if not isinstance(value, str):
                self.others[name] = _kind(value)
                continue
            examples = self.texts.setdefault(name, [])
            if value.strip():
                self.counts[name] = self.counts.get(name, 0) + 1
                if len(examples) < _EXAMPLES:
                    examples.append(value[:_EXAMPLE_CHARS])

    @property
    def inner_list(self) -> str | None:
        """A field with a list of objects, which may be the records."""
        return next((name for name, kind in self.others.items() if kind == _RECORDS), None)

    def candidates(self, requested: str | None) -> list[str]:
        """Fields that could be the text."""
        return choose_candidates(self.texts, requested)

    def rest(self, candidates: Sequence[str]) -> list[str]:
        """The other fields."""
        return [name for name in dict.fromkeys([*self.texts, *self.others]) if name not in candidates]

    def describe_rest(self, candidates: Sequence[str]) -> list[str]:
        """The other fields, each with what it holds where that is no string."""
        return [f"{name} ({self.others[name]})" if name in self.others else name for name in self.rest(candidates)]


class _Collector(JsonLines):
    """Reads objects, and takes note of their fields."""

    def __init__(self) -> None:
        super().__init__("")
        self.fields = Fields()

    def parse(self, raw: bytes, data_file: DataFile) -> tuple[str | None, str | None]:
        record, problem = parse_object(raw)
        if record is not None:
            self.fields.add(record)
        return None, problem


class _AnyOf(JsonLines):
    """The first of some columns with a text, by its name."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__("")
        self._names = names

    def parse(self, raw: bytes, data_file: DataFile) -> tuple[str | None, str | None]:
        record, problem = parse_object(raw)
        values = {name: (record or {}).get(name) for name in self._names}
        return next((n for n, value in values.items() if isinstance(value, str) and value.strip()), None), problem


def open_jsonl(files: Sequence[DataFile], spec: SourceSpec) -> FileSource:
    """Files of JSON lines, in the order given.

    Raises:
        DataError: there is no text column, or a file has no text.
    """
    found = inspect_files(files, spec)
    samples = dict(read_samples(found, lambda file: _sample(file, spec.section.max_record_bytes)))
    found.is_sampled = True
    found.drop(
        {
            file.url: describe_cause(file, fields.sample)
            for file, fields in samples.items()
            if is_hopeless(fields.sample) and not fields.num_objects
        }
    )
    nothing = not any(fields.num_objects or fields.sample.num_bad for fields in samples.values())
    if nothing and len(samples) == len(found.kept):
        raise DataError(f"dataset.path: {spec.label} has no text: none of its {len(files)} files has a record")
    usual, note = _choose_usual(found, samples, spec)
    columns: dict[str, str] = {}
    problems: dict[str, str] = {}
    for file, fields in samples.items():
        if found.reports[file.url].problem is None:
            columns[file.url], problem = _choose_column(file, fields, usual, spec)
            if problem is not None:
                problems[file.url] = problem
            _report(found, file, fields, columns[file.url])
    found.drop(problems)

    column_of = _ColumnOf(
        {url: column for url, column in columns.items() if column != usual}, usual, set(columns), spec
    )
    return build_file_source(found, JsonLines(usual, column_of), [note], spec)


@dataclass(frozen=True, slots=True)
class _ColumnOf:
    """The column of a file, which is looked for where the file was not sampled."""

    other: dict[str, str]
    usual: str
    sampled: set[str]
    spec: SourceSpec

    def __call__(self, file: DataFile) -> str:
        """Raises ShardFault where the file has no text."""
        if file.url in self.sampled:
            return self.other.get(file.url, self.usual)
        try:
            fields = _sample(file, self.spec.section.max_record_bytes)
            column, problem = _choose_column(file, fields, self.usual, self.spec)
        except ShardFault:
            return self.usual  # Damaged, which is said where it is.
        if problem is not None:
            raise ShardFault(f"{file.url} {problem}")
        return column


@lru_cache(maxsize=1 << 14)
def _sample(file: DataFile, max_record_bytes: int) -> Fields:
    collector = _Collector()
    sample = sample_lines(file, collector, max_record_bytes)
    collector.fields.sample = sample
    return collector.fields


def _choose_usual(found: Inspected, samples: Mapping[DataFile, Fields], spec: SourceSpec) -> tuple[str, str]:
    """The column of most files: of the first records, else of all that were sampled."""
    first = _first_records(found)
    candidates = first.candidates(spec.text_column)
    requested = spec.text_column
    if not candidates or (requested is not None and requested not in candidates):
        for fields in samples.values():
            for name, examples in fields.texts.items():
                first.texts.setdefault(name, []).extend(examples)
            first.others |= fields.others
        candidates = first.candidates(requested)
        if not candidates or (requested is not None and requested not in candidates):
            names = TEXT_COLUMNS if requested is None else (requested,)
            candidates = [*candidates, *_search_all(found.kept, names, spec.section.max_record_bytes)]
    nested = next((file for file, fields in samples.items() if fields.num_objects == 1 and fields.inner_list), None)
    if not candidates and nested is not None:
        raise DataError(f"{nested.url} {_no_column(nested, samples[nested], '', spec)}")
    return choose_text_column(candidates, first.describe_rest(candidates), requested, spec.label)


def _first_records(found: Inspected) -> Fields:
    collector = _Collector()
    for file in found.kept:
        try:
            with closing(
                FileShard(file, 0, collector, max_record_bytes=found.spec.section.max_record_bytes).read(None)
            ) as records:
                for _ in records:
                    if collector.fields.num_objects == COLUMN_SAMPLE:
                        return collector.fields
        except ShardFault as error:
            if found.spec.section.on_bad_shard == "error":
                raise DataError(str(error)) from error
    return collector.fields


def _choose_column(file: DataFile, fields: Fields, usual: str, spec: SourceSpec) -> tuple[str, str | None]:
    """The column of a file, and why there is none."""
    if fields.counts.get(usual) or not fields.num_objects:
        return usual, None
    requested = spec.text_column
    names = TEXT_COLUMNS if requested is None else (requested,)
    own = [name for name in names if fields.counts.get(name)][:1]
    if not own and requested is None:
        own = [name for name in fields.candidates(None) if fields.counts.get(name)]
    if len(own) == 1:
        return own[0], None
    if own:
        return usual, f"has several text columns ({', '.join(own)}); name one with dataset.text_column"
    if usual in fields.texts or fields.others.get(usual) == "null":
        return usual, None  # Its texts are empty, and nothing is wrong.
    later = _search(file, [usual, *names], spec.section.max_record_bytes)
    return (usual, _no_column(file, fields, usual, spec)) if later is None else (later, None)


def _no_column(file: DataFile, fields: Fields, usual: str, spec: SourceSpec) -> str:
    names = fields.describe_rest([])
    if fields.inner_list is not None and fields.num_objects == 1:
        remedy = f"write its records one a line: jq -c '.[\"{fields.inner_list}\"][]' {file.name} > NEW_FILE"
    elif spec.text_column is None:
        remedy = "name the column with dataset.text_column"
    else:
        remedy = "every file needs it"
    missing = "no text column" if spec.text_column is None else f"no text in column {usual!r}"
    return f"has {missing} (columns: {', '.join(names) or 'none'}); {remedy}"


def _search_all(files: Sequence[DataFile], names: Sequence[str], max_record_bytes: int) -> list[str]:
    """The first of these columns with a text anywhere in the first files."""
    left = _SEARCH_BYTES
    for file in files:
        if (name := _search(file, names, max_record_bytes)) is not None:
            return [name]
        left -= file.text_bytes
        if left < 0:
            break
    return []


def _search(file: DataFile, names: Sequence[str], max_record_bytes: int) -> str | None:
    """The first of these columns with a text anywhere in a file; of a very large file only its start is read, and
    the first name is believed."""
    limit = _SEARCH_REMOTE_BYTES if file.is_remote else _SEARCH_BYTES
    try:
        with closing(FileShard(file, 0, _AnyOf(names), max_record_bytes=max_record_bytes).read(None)) as records:
            for record in records:
                if record.text is not None:
                    return record.text
                if record.cursor["offset"] > limit:
                    return names[0]
    except ShardFault:
        return names[0]  # Damaged: that is said when its turn comes.
    return None


def _report(found: Inspected, file: DataFile, fields: Fields, column: str) -> None:
    sample = replace(fields.sample, num_usable=fields.counts.get(column, 0))
    report = found.reports[file.url].with_sample(sample)
    found.reports[file.url] = replace(report, column=column, columns=tuple(fields.rest([column])))


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return _RECORDS if value and all(isinstance(item, dict) for item in value) else "list"
    return {dict: "object", bool: "true or false"}.get(type(value), "number")
