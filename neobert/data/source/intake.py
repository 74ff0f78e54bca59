"""Looking into the files of a source before they are read, so that a file without text is an error of that file.

Of local files the first bytes are always read, and records of at most `MAX_SAMPLED` of them, spread evenly; of remote
files both of at most `MAX_REMOTE`. The column of a file that was not sampled is chosen when it is read.

The records come from several positions of a file: enough to say whether there is text in it, little enough for many
files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

from neobert.data.fingerprint import spread
from neobert.data.source.codecs import DAMAGED
from neobert.data.source.files import DataFile, cannot_read
from neobert.data.source.inventory import FileReport, Sample, name_some
from neobert.data.source.look import Look, look
from neobert.data.source.network import is_transient
from neobert.data.source.spec import SourceSpec
from neobert.data.source.text import Record, Shard
from neobert.errors import OR_SKIP_SHARD, DataError

FIRST_RECORDS = 100
MORE_RECORDS = 25
"""At each of the later positions."""

_FIRST_BYTES = 1 << 20
_MORE_BYTES = 1 << 16
_LATER_POSITIONS = 4


def sample_file(file: DataFile, open_range: Callable[[int, int | None], Shard], *, cuttable: bool) -> Sample:
    """Reads the first records, and some after each of four later positions where a file can be entered in its middle.

    Args:
        open_range: the records of a byte range of the file; None is its end.

    Raises:
        ShardFault: the file cannot be read.
    """
    sample = Sample()

    def add_range(begin: int, end: int | None, count: int, num_bytes: int) -> bool:
        """Adds the first records of a range; False where they are so large that another one would cost too much."""
        with closing(open_range(begin, end).read(None)) as records:
            for record in islice(records, count):
                _add(sample, record, file, begin)
                if record.cursor["offset"] > begin + num_bytes:
                    return False
        return True

    if add_range(0, None, FIRST_RECORDS, _FIRST_BYTES) and cuttable and not file.is_streamed:
        for number in range(1, _LATER_POSITIONS + 1):
            begin = (file.size - _MORE_BYTES) * number // _LATER_POSITIONS
            if begin > _MORE_BYTES and not add_range(begin, begin + _MORE_BYTES, MORE_RECORDS, 2 * _MORE_BYTES):
                break
    return sample


def _add(sample: Sample, record: Record, file: DataFile, begin: int) -> None:
    """Counts a record of a range that starts at byte `begin`."""
    sample.num_records += 1
    sample.num_usable += record.text is not None
    sample.num_bad += record.problem is not None
    if record.problem is not None and sample.problem is None:
        location, _, reason = record.problem.removeprefix(file.url).lstrip(":, ").partition(": ")
        # Lines before a later position were not counted.
        location = "in its middle" if begin else f"line {location}" if location.isdecimal() else location
        sample.problem = f"{location}: {reason}"


MAX_SAMPLED = 5000
MAX_REMOTE = 500

_THREADS = 16

Result = TypeVar("Result")


@dataclass(kw_only=True, slots=True)
class Inspected:
    """Files that were looked into: those to read, and what is known of all of them."""

    kept: list[DataFile]
    reports: dict[str, FileReport]
    num_empty: int
    spec: SourceSpec
    is_sampled: bool = False

    def __iter__(self) -> Iterator[DataFile]:
        return iter(self.kept)

    @property
    def notes(self) -> list[str]:
        """For the console."""
        return [f"{self.num_empty} empty files are skipped"] if self.num_empty else []

    def to_sample(self) -> list[DataFile]:
        """The files whose records are looked at."""
        return choose_spread(
            [file for file in self.kept if not file.is_remote or file.content is not None], MAX_SAMPLED
        )

    def report(self, url: str, **values: Any) -> None:
        """Adds to what is known of a file."""
        self.reports[url] = replace(self.reports[url], **values)

    def drop(self, problems: Mapping[str, str]) -> None:
        """Takes out files that have no text.

        Raises:
            DataError: there are any, and such files are not skipped; or none is left.
        """
        check_problems(problems, self.spec, left=len(self.kept) - len(problems))
        self.kept = [file for file in self.kept if file.url not in problems]
        for url, problem in problems.items():
            self.report(url, problem=problem, is_fault=True)


def inspect_files(files: Sequence[DataFile], spec: SourceSpec) -> Inspected:
    """Looks into files of one format.

    Raises:
        DataError: one of them has no text and `spec.section.on_bad_shard` is error, or all are empty.
    """
    chosen = choose_spread([file for file in files if file.is_remote], MAX_REMOTE)
    chosen += [file for file in files if not file.is_remote]
    looks = dict(zip([file.url for file in chosen], read_all(chosen, _look)))
    kept, problems, reports, num_empty = [], {}, {}, 0
    for file in files:
        seen = looks.get(file.url)
        if seen is None:
            kept.append(file)
            reports[file.url] = FileReport(url=file.url)
            continue
        remark = "empty" if seen.is_empty else "only blank lines" if seen.is_blank else seen.damage
        sampled = 0 if remark is not None else None
        reports[file.url] = FileReport(url=file.url, content=seen.content, remark=remark, num_sampled=sampled)
        if seen.problem is not None:
            problems[file.url] = seen.problem
        if seen.is_empty:
            num_empty += 1
        else:
            kept.append(replace(file, content=seen.content))
    if not kept:
        raise DataError(f"dataset.path: {spec.label} has no text: all of its {len(files)} files are empty")
    found = Inspected(kept=kept, reports=reports, num_empty=num_empty, spec=spec)
    found.drop(problems)
    return found


def check_problems(problems: Mapping[str, str], spec: SourceSpec, *, left: int) -> None:
    """Raises when files without text are not to be skipped, or nothing else is there.

    Raises:
        DataError: it names the first of them.
    """
    if not problems or (spec.section.on_bad_shard == "skip" and left > 0):
        return
    named = [f"{url} {problem}" for url, problem in problems.items()]
    found = named[0] if len(named) == 1 else f"{len(named):,} files have no text that can be read: {name_some(named)}"
    remedy = f"take {'it' if len(named) == 1 else 'them'} out of dataset.path{OR_SKIP_SHARD}"
    if spec.section.on_bad_shard == "skip":
        remedy = "no other file is left in dataset.path"
    raise DataError(f"{found}, {remedy}")


def read_all(files: Sequence[DataFile], read: Callable[[DataFile], Result]) -> list[Result]:
    """`read` of every file; of remote ones several at a time."""
    if not any(file.is_remote for file in files):
        return [read(file) for file in files]
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(read, files))


def choose_spread(files: Sequence[DataFile], most: int) -> list[DataFile]:
    """At most so many of the files, spread evenly."""
    if len(files) <= most:
        return list(files)
    return [files[number] for number in spread(len(files), most)]


def _look(file: DataFile) -> Look:
    """What is seen of a file; one that cannot be read is kept, and fails when its turn comes."""
    try:
        return look(file)
    except (OSError, *DAMAGED) as error:
        if is_transient(error):
            raise
        return Look(file.layers, damage=cannot_read(file, error))
