"""Rows with named columns, of the hub, a file, or a folder: what fine-tuning reads.

A local folder is what `save_to_disk` wrote, or files whose split is a word of their name as in pretraining. Files are
JSON lines, CSV, TSV (compressed too) or Parquet. A record that cannot be read is named and counted, as in pretraining:
more than `dataset.max_bad_records` of a source stop the work.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from neobert.config.schema_data import DatasetSection
from neobert.data.source.codecs import DAMAGED
from neobert.data.source.delimited import read_header, read_rows
from neobert.data.source.files import DataFile, kind_of_name
from neobert.data.source.formats import list_data_files
from neobert.data.source.hub import list_hub_splits, pin_hub
from neobert.data.source.intake import inspect_files
from neobert.data.source.inventory import NO_FILES, Inventory
from neobert.data.source.jsonl import find_surrogate, parse_object
from neobert.data.source.lines import BOM
from neobert.data.source.record_file import RecordFile
from neobert.data.source.spec import SourceSpec, describe_sources
from neobert.data.source.text import RecordCounts, TooLong, check_length
from neobert.errors import OR_SKIP_SHARD, DataError

RawRow = Mapping[str, Any]

TABLE_KINDS = ("JSON", "CSV", "Parquet")
"""Of `FORMATS`: those whose records have named columns."""

_ENDINGS = ".jsonl, .json, .csv, .tsv (also compressed: .gz, .zst, .xz, .bz2), .parquet"
_BATCH_ROWS = 1024

HubRows = Callable[[str, str | None, str, str | None], Iterable[RawRow]]
"""`fn(name, config, split, revision)`: the rows of a hub dataset."""


def read_hub(name: str, config: str | None, split: str, revision: str | None) -> Iterable[RawRow]:
    """The rows of a hub dataset, streamed.

    Raises:
        DataError: the hub does not give it.
    """
    try:
        rows: Iterable[RawRow] = load_dataset(name, config, split=split, revision=revision, streaming=True)
    except Exception as error:  # The library raises many kinds: names, network, permissions.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(
            f"{name} (configuration {config}, split {split}) cannot be read from the hub: {reason}. Check the spelling"
            " and the connection, or name a local file or folder"
        ) from error
    return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What reading a source puts up with."""

    max_record_bytes: int
    counts: RecordCounts


def read_file(file: DataFile, limits: Limits) -> Iterator[RawRow]:
    """The rows of a file.

    Raises:
        DataError: it is damaged, or too many of its records cannot be read.
    """
    kind = kind_of_name(file.name)
    assert kind is not None, "files of other kinds are refused before"
    read = {"Parquet": _read_parquet, "CSV": _read_delimited, "JSON": _read_jsonl}[kind]
    try:
        yield from _usable(read(file, limits.max_record_bytes), limits)
    except (OSError, pa.ArrowException, *DAMAGED) as error:
        raise DataError(f"{file.url} cannot be read ({error}); correct the file") from error


Found = Iterator[tuple[str, RawRow | None, str | None]]
"""(location, row, problem) of every record; neither row nor problem for a blank line."""


def _read_jsonl(file: DataFile, max_record_bytes: int) -> Found:
    with closing(RecordFile(file.open(), max_record_bytes)) as opened:
        for number, line in enumerate(iter(opened.read_line, None), start=1):
            content = line.content.removeprefix(BOM) if number == 1 else line.content
            row, problem = parse_object(content) if line.problem is None else (None, line.problem)
            yield file.name_line(number), row, problem


def _read_delimited(file: DataFile, max_record_bytes: int) -> Found:
    header = read_header(file)
    for line, fields, problem in read_rows(file, header, max_record_bytes):
        yield f"{file.url}:{line}", None if fields is None else dict(zip(header.columns, fields)), problem


def _read_parquet(file: DataFile, max_record_bytes: int) -> Found:
    number = 0
    with file.open_raw() as raw:
        opened = pq.ParquetFile(raw)
        size = sum(opened.metadata.row_group(group).total_byte_size for group in range(opened.num_row_groups))
        row_bytes = max(1, size // max(1, opened.metadata.num_rows))
        for batch in opened.iter_batches(max(1, min(_BATCH_ROWS, max_record_bytes // row_bytes))):
            for row, problem in _as_rows(batch):
                number += 1
                yield f"{file.url}: row {number}", row, problem


def _as_rows(batch: pa.RecordBatch) -> list[tuple[RawRow | None, str | None]]:
    try:
        return [(row, None) for row in batch.to_pylist()]
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [(None, str(error))]
    return [found for index in range(len(batch)) for found in _as_rows(batch.slice(index, 1))]


def _usable(found: Iterable[tuple[str, RawRow | None, str | None]], limits: Limits) -> Iterator[RawRow]:
    """The rows that can be used; the others are counted.

    Raises:
        DataError: there are too many of them.
    """
    for location, row, problem in found:
        try:
            problem = problem or _find_problem(row, limits.max_record_bytes)
        except RecursionError:  # JSON is read deeper than Python follows it.
            problem = "nested too deeply to be read"
        if problem is not None:
            limits.counts.add_bad(f"{location}: {problem}")
        elif row is not None:
            yield row


def number_rows(rows: Iterable[RawRow], label: str, limits: Limits) -> Iterator[RawRow]:
    """The usable rows of a library; their location is their number."""
    return _usable(((f"{label}, row {number}", row, None) for number, row in enumerate(rows, start=1)), limits)


def _find_problem(value: Any, max_record_bytes: int) -> str | None:
    """What is wrong with the texts in a value, however deep."""
    if isinstance(value, str):
        try:
            check_length(value, max_record_bytes)
        except TooLong as error:
            return str(error)
        return find_surrogate(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return next((problem for part in parts if (problem := _find_problem(part, max_record_bytes))), None)


def inspect_tables(files: Sequence[DataFile], label: str) -> list[DataFile]:
    """The files with something in them.

    Raises:
        DataError: one is no file of rows.
    """
    others = [file.url for file in files if kind_of_name(file.name) not in TABLE_KINDS]
    if others:
        raise DataError(f"{others[0]} has no rows with named columns; name files ending in {_ENDINGS}")
    try:
        return inspect_files(files, SourceSpec(path=(label,))).kept
    except DataError as error:  # No file can be skipped here.
        raise DataError(str(error).replace(OR_SKIP_SHARD, "")) from error


def is_saved_table(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def load_saved_table(folder: Path) -> dict[str | None, Iterable[RawRow]]:
    """The rows of what `save_to_disk` wrote, by split; None is the name of the only part where there are no splits."""
    data = load_from_disk(str(folder))
    if isinstance(data, DatasetDict):
        return dict(data)
    assert isinstance(data, Dataset)
    return {None: data}


# ---- the tables of a config ----


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tables:
    """The source of a config."""

    label: str
    splits: Mapping[str, Callable[[], Iterator[RawRow]]]
    """What reads the rows of each split."""

    inventory: Inventory = NO_FILES


def open_tables(section: DatasetSection) -> Tables:
    """The splits of `dataset.path`, else of `dataset.name`.

    Raises:
        DataError: there is no such source, or it has no rows with named columns.
    """
    spec, *others = describe_sources(section)
    if others or (spec.path and len(spec.path) > 1 and any(is_saved_table(Path(path)) for path in spec.path)):
        raise DataError(f"dataset.name: {section.name} names several sources; name one, or files with dataset.path")
    limits = Limits(
        max_record_bytes=section.max_record_bytes,
        counts=RecordCounts(max_bad=section.max_bad_records, where=spec.label),
    )
    if not spec.path:
        return _open_hub_tables(spec, limits)
    folder = Path(spec.path[0]).expanduser()
    if is_saved_table(folder):
        saved = load_saved_table(folder)
        return Tables(
            label=spec.label,
            splits={name or "train": partial(number_rows, rows, spec.label, limits) for name, rows in saved.items()},
        )
    try:
        found = list_data_files(spec)
    except DataError as error:
        raise DataError(str(error).replace(OR_SKIP_SHARD, "")) from error
    splits = {
        name: partial(_read_files, found.files_of(name), spec.label, limits)
        for name in dict.fromkeys(found.splits.values())
    }
    return Tables(label=spec.label, splits=splits, inventory=found.inventory)


def _read_files(files: Sequence[DataFile], label: str, limits: Limits) -> Iterator[RawRow]:
    for file in inspect_tables(files, label):
        yield from read_file(file, limits)


def _open_hub_tables(spec: SourceSpec, limits: Limits) -> Tables:
    pin, name = pin_hub(spec), str(spec.name)

    def read(split: str) -> Iterator[RawRow]:
        yield from number_rows(read_hub(name, spec.config, split, pin.commit), f"{name} of the hub", limits)

    return Tables(label=f"{name} of the hub", splits={split: partial(read, split) for split in list_hub_splits(pin)})
