"""Files of lines read with byte cursors: JSON lines, plain text, CSV; plain or compressed, local or remote.

A plain file is cut into byte ranges, one for each lane, where its format allows that: a record belongs to the range
that holds its first byte, so none is lost or read twice. A file that is compressed, or in another form than lines of
UTF-8, cannot be cut and goes whole to one lane; to continue in its middle everything before must be decompressed or
recoded, therefore consecutive windows keep the file open.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, NamedTuple, Protocol, TypeVar

from neobert.config.schema_data import MAX_RECORD_BYTES
from neobert.data.lazy import Lazy
from neobert.data.rows.lanes import State
from neobert.data.source.codecs import DAMAGED, skip_bytes
from neobert.data.source.files import DataFile, cannot_read, fingerprint_files
from neobert.data.source.intake import Inspected, read_all, sample_file
from neobert.data.source.inventory import NO_FILES, FileReport, Sample
from neobert.data.source.look import remedy_for_latin1
from neobert.data.source.network import is_transient
from neobert.data.source.record_file import RecordFile
from neobert.data.source.sharing import (
    MIN_LANE_BYTES,
    ShardedSource,
    check_part,
    cut_ranges,
    deal,
    fit_lanes,
)
from neobert.data.source.spec import SourceSpec
from neobert.data.source.text import (
    WHOLE,
    LaneReader,
    Record,
    Records,
    ShardFault,
    Sharding,
    ShardReader,
    Span,
    add_limit,
)

BOM = b"\xef\xbb\xbf"
"""Some programs write this mark at the start of a file; it is not part of the text."""

FAULTS = (OSError, *DAMAGED)
"""What reading a file that is gone, damaged or not allowed raises; errors of the network are among them."""


class Entry(NamedTuple):
    """A record as a format reads it."""

    size: int
    """Bytes."""

    num_lines: int
    text: str | None = None
    problem: str | None = None
    line: int = 1
    """The line of the record, from 1, that the problem is in."""


Result = TypeVar("Result")

ReadEntry = Callable[[RecordFile, DataFile, int], Entry | None]


class LineFormat(Protocol):
    """How records are written in a file."""

    cuttable: bool
    """Whether byte ranges of a plain file can be read apart."""

    def align(self, file: RecordFile, begin: int) -> int:
        """Moves a seekable file to the first border between records at or after `begin`; returns where that is."""

    def read(self, file: RecordFile, data_file: DataFile, start: int) -> Entry | None:
        """The record at byte `start`, where the file is; None at the end of the file."""

    def skip(self, file: RecordFile, data_file: DataFile, start: int) -> Entry | None:
        """The same without looking into it more than needed."""


class FileShard:
    """A file, or the byte range [begin, end) of one. In a plain file the two need not be borders between records."""

    def __init__(
        self,
        file: DataFile,
        number: int,
        form: LineFormat,
        begin: int = 0,
        end: int | None = None,
        line: int | None = 0,
        max_record_bytes: int = MAX_RECORD_BYTES,
    ) -> None:
        """
        Args:
            line: lines before `begin`; None: they are counted when a bad record is to be named.
        """
        self._parked: tuple[int, RecordFile] | None = None
        self._max_record_bytes = max_record_bytes
        self._file, self.number, self._format, self._begin, self._end = file, number, form, begin, end
        self._lines_before = line
        self.size = max(0, (file.text_bytes if end is None else end) - begin)

    def read(self, position: State | None) -> Records:
        """Records after `position`, `{"offset": byte in the uncompressed file, "line": lines since begin}`.

        `line` is None in a position that was found without reading what is before it.
        """
        offset, line = (None, 0) if position is None else (position["offset"], position["line"])
        file, offset = self._open(offset)
        try:
            while self._end is None or offset < self._end:
                entry = self._read_entry(self._format.read, file, offset)
                if entry is None:
                    break
                start, offset, problem = offset, offset + entry.size, entry.problem
                if problem is not None:
                    line_number = self._count_lines(start) if line is None else self._lines_to_begin() + line
                    problem = f"{self._file.name_line(line_number + entry.line)}: {problem}"
                line = None if line is None else line + entry.num_lines
                yield Record((self.number << 40) | start, entry.text, problem, {"offset": offset, "line": line})
        except GeneratorExit:
            self._parked = (offset, file)
            raise
        except BaseException:
            file.close()
            raise
        file.close()

    def position_after(self, count: int) -> tuple[State | None, int]:
        """Position after the record with this number, or after the last one, and how many that were."""
        line = passed = 0
        file, offset = self._open(0)
        with closing(file):
            while passed < count:
                entry = self._read_entry(self._format.skip, file, offset)
                if entry is None:
                    break
                offset, line, passed = offset + entry.size, line + entry.num_lines, passed + 1
        return {"offset": offset, "line": line}, passed

    def align(self, begin: int) -> State:
        """The position of the first border between records at or after byte `begin` of a plain file."""
        try:
            with closing(RecordFile(self._file.open(), self._max_record_bytes)) as file:
                return {"offset": self._format.align(file, begin), "line": None}
        except FAULTS as error:
            self._check_fault(error)
            raise

    def __del__(self) -> None:
        if self._parked is not None:
            self._parked[1].close()

    def _open(self, offset: int | None) -> tuple[RecordFile, int]:
        parked, self._parked = self._parked, None
        start = self._begin if offset is None else offset
        file: RecordFile | None = None
        try:
            if parked is not None:
                file = parked[1]
                if parked[0] == offset:
                    if not self._file.is_remote:
                        self._file.check_unchanged()
                    return file, start
                file.close()
            opened = self._file.open()
            file = RecordFile(opened, self._max_record_bytes)
            if self._file.is_streamed:
                skip_bytes(opened, start)
            elif offset is None and start:
                start = self._format.align(file, start)
            else:
                file.seek(start)
        except BaseException as error:
            if file is not None:
                file.close()
            self._check_fault(error)
            raise
        return file, start

    def _read_entry(self, read: ReadEntry, file: RecordFile, offset: int) -> Entry | None:
        try:
            return read(file, self._file, offset)
        except FAULTS as error:
            self._check_fault(error)
            raise

    def _check_fault(self, error: BaseException) -> None:
        """Raises when an error means that the file is no good, not that the network is."""
        if isinstance(error, FAULTS) and not is_transient(error):
            raise ShardFault(cannot_read(self._file, error)) from error

    def _lines_to_begin(self) -> int:
        if self._lines_before is None:
            self._lines_before = self._count_lines(self._begin)
        return self._lines_before

    def _count_lines(self, end: int) -> int:
        """Lines that begin before byte `end`: counted only to report the location of a bad record."""
        left, count, last = end, 0, b"\n"
        with self._file.open() as file:
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                left, count, last = left - len(block), count + block.count(b"\n"), block[-1:]
        return count + (last != b"\n")


class FileSource(ShardedSource):
    """Files of one format, one after the other."""

    def __init__(
        self,
        files: Sequence[DataFile],
        form: LineFormat,
        *,
        label: str,
        notes: list[str],
        fingerprint: str,
        max_record_bytes: int,
    ) -> None:
        super().__init__(label, [file.text_bytes for file in files])
        self._max_record_bytes = max_record_bytes
        self._files, self._format, self.notes, self.fingerprint = list(files), form, notes, fingerprint
        self._cuttable = form.cuttable and not any(file.is_streamed for file in files)
        self.reports: dict[str, FileReport] = {}
        """What is known of its files, those that were left out too."""

    def __getstate__(self) -> dict[str, Any]:
        """What another process reads with; only this one describes the files."""
        return self.__dict__ | {"reports": {}, "inventory": NO_FILES}

    def build_shard(self, number: int, span: Span = WHOLE) -> FileShard:
        begin, end = span.after or {"offset": 0}, span.until or {"offset": None}
        return self._range(number, begin["offset"], end["offset"], None if span.after else 0)

    def readers(self, sharding: Sharding, span: Span = WHOLE) -> Sequence[LaneReader]:
        if not self._cuttable:
            return super().readers(sharding, span)
        ranges = [
            (number, *part.numbers("offset", self._sizes[number])) for number, part in span.shards(len(self._files))
        ]
        most = max(1, sum(end - begin for _, begin, end in ranges) // MIN_LANE_BYTES)

        def build(count: int) -> Sequence[LaneReader]:
            of_lane = cut_ranges(ranges, count)
            return Lazy(
                count,
                lambda lane: ShardReader(
                    [self._range(n, begin, end, None if begin else 0) for n, begin, end in of_lane[lane]],
                    sharding,
                    lane,
                ),
            )

        # Any number of byte ranges can be read; `most` only says which of them are too small.
        if sharding.num_lanes is not None and not sharding.exact:
            return build(sharding.num_lanes)
        return deal(build, sharding, most=most, chosen=fit_lanes(sharding.most, most), label=self._label)

    def position_after(self, shard: int, number: int) -> tuple[State | None, int]:
        return self.build_shard(shard).position_after(number)

    def part(self, number: int, count: int) -> Span:
        if not self._cuttable:
            return super().part(number, count)
        check_part(number, count, max(1, sum(self._sizes)), self._label)
        return Span(
            after=self._border(number, count) if number else None,
            until=self._border(number + 1, count) if number + 1 < count else None,
        )

    def _range(self, number: int, begin: int, end: int | None, line: int | None) -> FileShard:
        return FileShard(self._files[number], number, self._format, begin, end, line, self._max_record_bytes)

    def _border(self, number: int, count: int) -> State:
        """The border between records after `number` of `count` equal runs of bytes."""
        left = sum(self._sizes) * number // count
        shard = 0
        while left >= self._sizes[shard]:
            left, shard = left - self._sizes[shard], shard + 1
        if not left:
            return {"shard": shard, "position": None}
        return {"shard": shard, "position": self.build_shard(shard).align(left)}


def build_file_source(found: Inspected, form: LineFormat, notes: Sequence[str], spec: SourceSpec) -> FileSource:
    """A source over files of one format.

    Raises:
        DataError: one has no text or cannot be read, and `spec.section.on_bad_shard` is error.
    """
    if not found.is_sampled:
        check_samples(found, lambda file: sample_lines(file, form, spec.section.max_record_bytes))
    fingerprint = fingerprint_files(found.kept, skip_unreadable=spec.section.on_bad_shard == "skip")
    source = FileSource(
        found.kept,
        form,
        label=spec.label,
        notes=[*notes, *found.notes],
        fingerprint=add_limit(fingerprint, spec.section.max_record_bytes),
        max_record_bytes=spec.section.max_record_bytes,
    )
    source.reports = found.reports
    return source


def check_samples(found: Inspected, read: Callable[[DataFile], Sample]) -> None:
    """Samples the files, and takes out those in which no record can be read.

    Raises:
        DataError: there are any, and such files are not skipped.
    """
    problems = {}
    for file, sample in read_samples(found, read):
        found.reports[file.url] = found.reports[file.url].with_sample(sample)
        if is_hopeless(sample):
            problems[file.url] = describe_cause(file, sample)
    found.is_sampled = True
    found.drop(problems)


def read_samples(found: Inspected, read: Callable[[DataFile], Result]) -> list[tuple[DataFile, Result]]:
    """`read` of the files that are to be sampled. A damaged one has none; that is noted, and an error in its turn."""

    def try_read(file: DataFile) -> Result | ShardFault:
        try:
            return read(file)
        except ShardFault as error:
            return error

    samples = []
    files = found.to_sample()
    for file, sample in zip(files, read_all(files, try_read)):
        if isinstance(sample, ShardFault):
            found.report(file.url, remark=str(sample))
        else:
            samples.append((file, sample))
    return samples


def sample_lines(file: DataFile, form: LineFormat, max_record_bytes: int) -> Sample:
    """Samples a file of lines.

    Raises:
        ShardFault: it cannot be read.
    """

    # Line numbers count from where a range starts; counting those before would mean reading them.
    def open_range(begin: int, end: int | None) -> FileShard:
        return FileShard(file, 0, form, begin, end, max_record_bytes=max_record_bytes)

    return sample_file(file, open_range, cuttable=form.cuttable)


def is_hopeless(sample: Sample) -> bool:
    """Whether no record can be read. One that is too long says nothing about the others."""
    return bool(sample.num_bad and not sample.num_usable and "dataset.max_record_bytes" not in str(sample.problem))


def describe_cause(file: DataFile, sample: Sample) -> str:
    """Why a file has no text, from the first record that cannot be read."""
    problem, remedy = str(sample.problem), "correct the file"
    if "codec can't decode" in problem:
        remedy = remedy_for_latin1(file)
    return f"has no text: no record of its sample can be read, {problem}; {remedy}"
