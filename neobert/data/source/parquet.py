"""Text from Parquet files, local or remote: only the text column is read, and the shards are row groups.

A position is `{"row": rows of the group already read}`. To continue in the middle of a group, its rows before are read
again and skipped, so the cost is bounded by one group. The footers are read once, when the source is opened; with
`dataset.on_bad_shard: skip`, a file whose footer cannot be read becomes one shard that fails when its turn comes.
The library decodes whole pages: a cell over `dataset.max_record_bytes` is in memory with its page until it is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from neobert.data.lazy import Lazy
from neobert.data.rows.lanes import State
from neobert.data.source.files import DataFile, cannot_read, fingerprint_files
from neobert.data.source.intake import Inspected, inspect_files
from neobert.data.source.inventory import NO_FILES, FileReport
from neobert.data.source.network import is_transient
from neobert.data.source.sharing import (
    MIN_LANE_BYTES,
    ShardedSource,
    choose_borders,
    deal,
    fit_lanes,
    too_few,
)
from neobert.data.source.spec import TEXT_COLUMNS, SourceSpec, choose_text_column, may_be_text, split_schema
from neobert.data.source.text import (
    WHOLE,
    LaneReader,
    Record,
    Records,
    ShardFault,
    Sharding,
    ShardReader,
    Span,
    TooLong,
    add_limit,
)
from neobert.data.store.arrow import as_text
from neobert.errors import DataError

_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20
_FOOTER_THREADS = 8
_FAULTS = (OSError, pa.ArrowException, UnicodeDecodeError)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroup:
    """One row group, as the footer describes it. Without a footer: the whole file, and no rows."""

    file: DataFile
    group: int
    first_row: int
    """Rows of the source before it."""

    num_rows: int
    text_bytes: int
    """Of the text column, uncompressed."""

    column: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Footer:
    file: DataFile
    schema: pa.Schema
    metadata: pq.FileMetaData


Value = tuple[str | None, str | None]
"""(text, problem) of a row."""


class RowGroupShard:
    """Rows [begin, end) of a row group. Consecutive readings continue in the file that the one before left open."""

    def __init__(self, row_group: RowGroup, number: int, begin: int, end: int | None, max_record_bytes: int) -> None:
        self._max_record_bytes = max_record_bytes
        self._parked: tuple[int, BinaryIO, Iterator[Value]] | None = None
        self._row_group, self.number, self._begin = row_group, number, begin
        self._end = row_group.num_rows if end is None else end
        self.size = row_group.text_bytes * max(0, self._end - begin) // max(1, row_group.num_rows)

    def read(self, position: State | None) -> Records:
        """Records after `position`, `{"row": rows of the group read}`."""
        row_group, row = self._row_group, self._begin if position is None else position["row"]
        if row_group.num_rows and row >= self._end:
            return
        file: BinaryIO | None = None
        try:
            file, values = self._open(row)
            for text, problem in values:
                row += 1
                if problem is not None:
                    problem = f"{row_group.file.url}: row group {row_group.group}, row {row}: {problem}"
                usable = text if text is not None and text.strip() else None
                yield Record(row_group.first_row + row - 1, usable, problem, {"row": row})
                if row == self._end:
                    break
        except GeneratorExit:
            assert file is not None
            self._parked = (row, file, values)
            raise
        except BaseException as error:
            if file is not None:
                file.close()
            if isinstance(error, _FAULTS) and not is_transient(error):
                reason = cannot_read(row_group.file, error)
                raise ShardFault(f"row group {row_group.group} of {reason}") from error
            raise
        file.close()

    def __del__(self) -> None:
        if self._parked is not None:
            self._parked[1].close()

    def _open(self, row: int) -> tuple[BinaryIO, Iterator[Value]]:
        parked, self._parked = self._parked, None
        if parked is not None:
            if parked[0] == row:
                if not self._row_group.file.is_remote:
                    self._row_group.file.check_unchanged()
                return parked[1], parked[2]
            parked[1].close()
        file = self._row_group.file.open_raw()
        return file, self._values(file, row)

    def _values(self, file: BinaryIO, first: int) -> Iterator[Value]:
        opened = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
        row, limit = 0, self._max_record_bytes
        row_bytes = self._row_group.text_bytes // max(1, self._row_group.num_rows)
        batch_rows = max(1, min(_BATCH_ROWS, limit // max(1, row_bytes)))
        group, columns = self._row_group.group, [self._row_group.column]
        for batch in opened.iter_batches(batch_rows, row_groups=[group], columns=columns):
            if row + len(batch) > first:
                yield from _texts(batch.column(0).slice(max(0, first - row)), limit)
            row += len(batch)


class ParquetSource(ShardedSource):
    """Parquet files, one after the other."""

    def __init__(
        self,
        row_groups: Sequence[RowGroup],
        *,
        label: str,
        notes: list[str],
        fingerprint: str,
        max_record_bytes: int,
    ) -> None:
        super().__init__(label, [row_group.text_bytes for row_group in row_groups])
        self._max_record_bytes = max_record_bytes
        self._row_groups = row_groups
        self.notes, self.fingerprint = notes, fingerprint
        self.reports: dict[str, FileReport] = {}
        """What is known of its files, those that were left out too."""

    def __getstate__(self) -> dict[str, Any]:
        """What another process reads with; only this one describes the files."""
        return self.__dict__ | {"reports": {}, "inventory": NO_FILES}

    def build_shard(self, number: int, span: Span = WHOLE) -> RowGroupShard:
        begin, end = span.after or {"row": 0}, span.until or {"row": None}
        return RowGroupShard(self._row_groups[number], number, begin["row"], end["row"], self._max_record_bytes)

    def readers(self, sharding: Sharding, span: Span = WHOLE) -> Sequence[LaneReader]:
        parts = span.shards(len(self._sizes))
        sizes = [self._sizes[n] if part.is_whole else self.build_shard(n, part).size for n, part in parts]

        def build(count: int) -> Sequence[LaneReader]:
            borders = choose_borders(sizes, count)
            return Lazy(
                count,
                lambda lane: ShardReader(
                    [self.build_shard(*part) for part in parts[borders[lane] : borders[lane + 1]]], sharding, lane
                ),
            )

        chosen = fit_lanes(sharding.most, min(len(parts), sum(sizes) // MIN_LANE_BYTES))
        return deal(build, sharding, most=len(parts), chosen=chosen, label=self._label)

    def count(self, span: Span = WHOLE) -> int | None:
        return self._num_rows if span.is_whole else None

    @property
    def _num_rows(self) -> int:
        return self._row_groups[-1].first_row + self._row_groups[-1].num_rows

    def cursor_after(self, number: int) -> State:
        for shard, row_group in enumerate(self._row_groups):
            if row_group.first_row < number <= row_group.first_row + row_group.num_rows:
                return {"shard": shard, "position": {"row": number - row_group.first_row}}
        raise too_few(self._label, number, self._num_rows)


def open_parquet(files: Sequence[DataFile], spec: SourceSpec) -> ParquetSource:
    """Parquet files, in the order given.

    Raises:
        DataError: a file has no footer or no text column, or all are empty.
    """
    found = inspect_files(files, spec)
    skip = spec.section.on_bad_shard == "skip"
    with ThreadPoolExecutor(_FOOTER_THREADS) as threads:
        footers = dict(zip([file.url for file in found], threads.map(lambda file: _read_footer(file, skip), found)))
    read = [footer for footer in footers.values() if footer is not None]
    if not read:
        raise DataError(f"dataset.path: no footer of {spec.label} can be read; restore the files")
    full = [footer for footer in read if footer.metadata.num_rows]
    if not full:
        raise DataError(f"dataset.path: {spec.label} has no text: all of its {len(files)} files are empty")
    usual, note = _choose_usual(full, spec)
    columns, problems = {}, {}
    for footer in full:
        columns[footer.file.url], problem = _choose_column(footer, usual, spec)
        if problem is not None:
            problems[footer.file.url] = problem
    found.drop(problems)
    row_groups = _list_row_groups(found, footers, columns)
    if not any(row_group.num_rows for row_group in row_groups):
        raise DataError(f"dataset.path: {spec.label} has no text: all of its {len(files)} files are empty")
    source = ParquetSource(
        row_groups,
        label=spec.label,
        notes=[note, *found.notes],
        fingerprint=add_limit(fingerprint_files(found.kept, skip_unreadable=skip), spec.section.max_record_bytes),
        max_record_bytes=spec.section.max_record_bytes,
    )
    source.reports = found.reports
    return source


def _list_row_groups(
    found: Inspected, footers: Mapping[str, _Footer | None], columns: Mapping[str, str]
) -> list[RowGroup]:
    """The row groups of all files; files without texts have none."""
    row_groups: list[RowGroup] = []
    first_row = 0
    for file in found:
        footer = footers[file.url]
        if footer is None:
            found.report(file.url, remark="its footer cannot be read", num_sampled=0)
            whole = RowGroup(file=file, group=0, first_row=first_row, num_rows=0, text_bytes=file.size, column="")
            row_groups.append(whole)
        elif file.url not in columns:
            found.report(file.url, remark="empty", num_sampled=0)
        elif pa.types.is_null(footer.schema.field(columns[file.url]).type):
            rows = footer.metadata.num_rows
            found.report(file.url, remark=f"no text in its {rows:,} rows", num_sampled=rows)
        else:
            groups = _row_groups(footer, columns[file.url], first_row)
            _report(found, footer, columns[file.url])
            row_groups += groups
            first_row += sum(row_group.num_rows for row_group in groups)
    return row_groups


def _report(found: Inspected, footer: _Footer, column: str) -> None:
    """What the footer says about a file: rows with a value, where it counts them."""
    num_rows, nulls = footer.metadata.num_rows, [s.null_count for s in _statistics(footer, column) if s.has_null_count]
    num_usable = num_rows - sum(nulls)
    remark = f"text in {num_usable:,} of its {num_rows:,} rows" if num_rows > 2 * num_usable else None
    counts = {"num_sampled": num_rows, "num_usable": num_usable}
    names = tuple(name for name in footer.schema.names if name != column)
    found.report(footer.file.url, column=column, columns=names, remark=remark, **counts)


def _read_footer(file: DataFile, skip: bool) -> _Footer | None:
    try:
        with file.open_raw() as raw:
            opened = pq.ParquetFile(raw)
            return _Footer(file=file, schema=opened.schema_arrow, metadata=opened.metadata)
    except _FAULTS as error:
        if is_transient(error):
            raise
        if skip:
            return None
        raise DataError(cannot_read(file, error)) from error


def _choose_usual(footers: Sequence[_Footer], spec: SourceSpec) -> tuple[str, str]:
    """The column of most files: of the first one with values in it."""
    requested = spec.text_column
    for footer in footers:
        texts, others = split_schema(footer.schema, requested)
        if requested is None and not texts and "input_ids" in footer.schema.names:
            raise DataError(
                f"dataset.path: {footer.file.url} holds input_ids and no text; tokenised documents are read from "
                'folders of save_to_disk: `datasets.load_dataset("parquet", data_files=...)["train"].save_to_disk(...)`'
                " makes one, or tokenise the text again"
            )
        if texts:
            break
    else:
        texts, others = split_schema(footers[0].schema, requested)
    candidates = [name for name in texts if _is_believable(footers, name, requested)]
    return choose_text_column(candidates, [*others, *(set(texts) - set(candidates))], requested, spec.label)


def _is_believable(footers: Sequence[_Footer], name: str, requested: str | None) -> bool:
    """Whether a column could be the text, as far as the first and last values in the footers show."""
    if name == requested or name in TEXT_COLUMNS:
        return True
    ends = [
        value
        for footer in footers
        if name in footer.schema.names
        for statistics in _statistics(footer, name)
        if statistics.has_min_max
        for value in (statistics.min, statistics.max)
    ]
    return not ends or may_be_text(value for value in ends if isinstance(value, str))


def _choose_column(footer: _Footer, usual: str, spec: SourceSpec) -> tuple[str, str | None]:
    """The column of a file, and why there is none."""
    texts, others = split_schema(footer.schema, usual)
    if usual in texts:
        return usual, None
    if spec.text_column is None:
        candidates = [name for name in texts if _is_believable([footer], name, None)]
        own = [name for name in TEXT_COLUMNS if name in candidates][:1] or candidates
        if len(own) == 1:
            return own[0], None
    columns = ", ".join([*texts, *others]) or "none"
    return (
        usual,
        f"has no text column {usual!r} (columns: {columns}); name one that every file has with dataset.text_column",
    )


def _statistics(footer: _Footer, column: str) -> list[pq.Statistics]:
    """Of every row group, where they were written."""
    metadata, leaf = footer.metadata, _leaf(footer, column)
    found = [metadata.row_group(group).column(leaf) for group in range(metadata.num_row_groups)]
    return [chunk.statistics for chunk in found if chunk.is_stats_set]


def _leaf(footer: _Footer, column: str) -> int:
    metadata = footer.metadata
    return next(n for n in range(metadata.num_columns) if metadata.schema.column(n).path == column)


def _row_groups(footer: _Footer, column: str, first_row: int) -> list[RowGroup]:
    metadata, leaf, found = footer.metadata, _leaf(footer, column), []
    for group in range(metadata.num_row_groups):
        described = metadata.row_group(group)
        if described.num_rows:
            size, rows = described.column(leaf).total_uncompressed_size, described.num_rows
            found.append(
                RowGroup(
                    file=footer.file, group=group, first_row=first_row, num_rows=rows, text_bytes=size, column=column
                )
            )
            first_row += rows
    return found


def _texts(values: pa.Array, max_record_bytes: int) -> Iterator[Value]:
    try:
        if values.nbytes <= max_record_bytes:  # So no cell is larger.
            yield from [(_decode(text), None) for text in values.to_pylist()]
            return
    except UnicodeDecodeError:
        pass
    for value in values:
        try:
            yield as_text(value, max_record_bytes), None
        except (UnicodeDecodeError, TooLong) as error:
            yield None, str(error)


def _decode(value: str | bytes | None) -> str | None:
    """The text of a cell, also of a binary one."""
    return value.decode("utf-8") if isinstance(value, bytes) else value
