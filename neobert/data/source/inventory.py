"""What every file of a source is: read or not and why, in which split and by which word, with which columns and how
much text in a sample. Shown before the first step; whole in `events.jsonl` and with `preprocess.py --debug`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from neobert.data.source.files import DataFile
from neobert.secrets import hide_credentials, scrub

_NAMED = 4
"""Files that a line names; the others are counted."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """What some records of a file are."""

    num_records: int = 0
    num_usable: int = 0
    num_bad: int = 0
    problem: str | None = None
    """Of the first one that is bad, with its location."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileReport:
    """A file that was found."""

    url: str
    split: str | None = None
    word: str | None = None
    """The part of its name that says so; None where none does, and it is train."""

    problem: str | None = None
    """Why it is not read."""

    is_fault: bool = False
    """Whether it should have been: a damaged or missing file, not one that is no data."""

    remark: str | None = None
    """What is unusual about a file that is read."""

    content: tuple[str, ...] = ()
    """How it becomes lines of UTF-8."""

    column: str | None = None
    columns: tuple[str, ...] = ()
    """The others there are."""

    num_sampled: int | None = None
    """Records; None where it was not looked into."""

    num_usable: int = 0
    num_bad: int = 0

    def with_sample(self, sample: Sample) -> "FileReport":
        """With the counts of a sample, and a remark where much of it has no text."""
        remark = self.remark
        if sample.num_records and not sample.num_usable and not sample.num_bad:
            remark = remark or "no text in its sample"
        elif sample.num_records > 2 * sample.num_usable:
            reason = f"; {sample.problem}" if sample.problem else ""
            remark = remark or f"text in {sample.num_usable} of {sample.num_records} sampled records{reason}"
        records, usable, bad = sample.num_records, sample.num_usable, sample.num_bad
        return replace(self, remark=remark, num_sampled=records, num_usable=usable, num_bad=bad)

    def as_line(self) -> dict[str, Any]:
        """Its fields that say something."""
        values = {name: value for name, value in asdict(self).items() if value not in (None, (), False, 0)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """The files of a source, or of several."""

    files: tuple[FileReport, ...] = ()

    def __add__(self, other: "Inventory") -> "Inventory":
        """Both; of a file that is in both, the report that knows more."""
        found = {report.url: report for report in self.files}
        for report in other.files:
            known = found.get(report.url)
            if known is None or (known.num_sampled is None and known.problem is None):
                found[report.url] = report
        return Inventory(files=tuple(found.values()))

    def with_content(self, reports: Mapping[str, FileReport]) -> "Inventory":
        """With what was seen in the files that were looked into; their names are known here."""
        files = (
            replace(reports[known.url], split=known.split, word=known.word) if known.url in reports else known
            for known in self.files
        )
        return Inventory(files=tuple(files))

    def notes(self) -> list[str]:
        """What was found, in a few lines without secrets."""
        if not self.files:
            return []
        kept = [report for report in self.files if report.problem is None]
        splits = Counter(report.split for report in kept)
        counts = ", ".join(f"{count:,} {name}" for name, count in splits.items())
        lines = [f"{count_files(len(self.files))}: {len(kept):,} read ({counts})"]
        if unread := len(self.files) - len(kept):
            lines[0] += f", {unread:,} not read"
        sampled = [report for report in kept if report.num_sampled is not None]
        if sampled:
            total, usable = (sum(getattr(r, name) or 0 for r in sampled) for name in ("num_sampled", "num_usable"))
            opened = {r.split for r in sampled}
            is_whole = all(r.num_sampled is not None for r in kept if r.split in opened)
            scope = "" if is_whole else f" of {count_files(len(sampled))}; not every file was sampled"
            lines.append(f"text in {usable:,} of {total:,} sampled records{scope}")
        by_word = [r for r in kept if r.word is not None]
        for split in dict.fromkeys(r.split for r in by_word if r.split != "train"):
            members = [f"{r.word!r} in {_short(r.url)}" for r in by_word if r.split == split]
            lines.append(f"split {split} by {name_some(members)}")
        recoded = [f"{_short(r.url)} ({', '.join(r.content)})" for r in kept if not _is_named_so(r)]
        if recoded:
            lines.append(f"read as their content says: {name_some(recoded)}")
        with_column = [r for r in kept if r.column is not None]
        usual = Counter(r.column for r in with_column).most_common(1)
        other = [f"{r.column!r} in {_short(r.url)}" for r in with_column if r.column != usual[0][0]]
        if other:
            lines.append(f"text from column {name_some(other)}")
        return [scrub(line) for line in lines]

    def warnings(self) -> list[str]:
        """What somebody should know: files that are not read, and files with little text."""
        unread = [f"{_short(r.url)} ({r.problem})" for r in self.files if r.problem is not None]
        remarks = [f"{_short(r.url)} ({r.remark})" for r in self.files if r.problem is None and r.remark is not None]
        found = [f"{count_files(len(unread))} not read: {name_some(unread)}"] if unread else []
        found += [f"{count_files(len(remarks))} to look at: {name_some(remarks)}"] if remarks else []
        return [scrub(text) for text in found]

    def as_lines(self) -> list[dict[str, Any]]:
        """Every file, for `events.jsonl`."""
        return [report.as_line() for report in self.files]

    def table(self) -> list[str]:
        """Every file in a line, for people, without secrets."""
        return [
            scrub(f"{line.pop('url')}: {', '.join(f'{name} {_show(value)}' for name, value in line.items())}")
            for line in self.as_lines()
        ]


NO_FILES = Inventory()
"""Of a source that is not read file by file."""


def _is_named_so(report: FileReport) -> bool:
    return report.content == DataFile(url=report.url, size=0, stamp="").layers


def count_files(number: int) -> str:
    """So many files."""
    return f"{number:,} file" + ("" if number == 1 else "s")


def _short(url: str) -> str:
    """The last two parts of a path; what signs an address is hidden while it is still known as one."""
    return "/".join(hide_credentials(url).split("/")[-2:])


def name_some(items: Iterable[str]) -> str:
    """The first items, and how many more there are."""
    listed = list(items)
    rest = len(listed) - _NAMED
    return ", ".join(listed[:_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


def _show(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
