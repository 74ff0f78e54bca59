"""Long jobs over the records of an input, in memory that does not grow with it, which continue where they were killed.

A job reads groups of records that depend on the input and the settings alone, works on one group at a time, and after
each of them notes in a small JSON file what is done and where reading continues. So a job that was killed makes the
groups of one that was not, and what it writes has the same bytes.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from neobert.config.nesting import parse_json
from neobert.data.fingerprint import fits
from neobert.data.rows.lanes import State
from neobert.disk import write_text
from neobert.errors import UserError
from neobert.inference.texts import InputRecord, Texts
from neobert.terminal import progress_bar


class JobError(UserError, ValueError):
    """A job cannot start or continue; the message says what to do."""


def check_absent(output: Path) -> None:
    """Raises JobError when there is something at `output` already."""
    if output.exists():
        raise JobError(f"--output: {output} exists already; delete it, or name another file")


def load_done(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What `save_done` wrote last; None at the start of a job.

    Raises:
        JobError: it was written by a job with other settings.
    """
    if not file.is_file():
        return None
    saved = parse_json(file.read_text())
    theirs = saved.pop("settings")
    if unknown := [name for name, value in settings.items() if value is not None and name not in theirs]:
        raise JobError(
            f"{file} belongs to an unfinished job of an earlier version, which made it in another way "
            f"({', '.join(unknown)} not recorded); delete {file.parent if file.parent.suffix == '.parts' else file}"
        )
    if different := [name for name in settings if not fits(theirs.get(name), settings[name])]:
        found = "; ".join(f"{name} was {theirs.get(name)!r} and is {settings[name]!r}" for name in different)
        raise JobError(f"{file} belongs to an unfinished job of other settings ({found}); give those, or delete it")
    return saved


def save_done(file: Path, settings: dict[str, Any], done: dict[str, Any]) -> None:
    """Records how far a job is, in one stroke."""
    text = json.dumps({"settings": settings, **done}) + "\n"
    write_text(file, text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """What this start of a job did; an earlier one that was interrupted does not count."""

    num_texts: int
    num_tokens: int
    seconds: float

    def describe(self) -> str:
        """One line for people."""
        seconds = max(self.seconds, 1e-9)
        return (
            f"{self.num_texts:,} texts and {self.num_tokens:,} tokens in {self.seconds:.1f} s: "
            f"{self.num_texts / seconds:,.1f} texts/s, {self.num_tokens / seconds:,.0f} tokens/s"
        )


class Located(Protocol):
    """A record of an input, as `Text` and `InputRecord` are."""

    @property
    def number(self) -> int: ...

    @property
    def cursor(self) -> State: ...


R = TypeVar("R", bound=Located)


class TextJob:
    """The progress of one job over an input."""

    def __init__(self, texts: Texts, file: Path | None, settings: Mapping[str, Any], **counts: Any) -> None:
        """Reads what an earlier start has done.

        Args:
            file: what is done is noted here; None keeps it in memory, and nothing can be resumed.
            settings: what the result depends on beside the input.
            counts: what the job counts in `done` beside `num_texts` and `num_tokens`, and where each starts.

        Raises:
            JobError: the file belongs to a job with other settings.
        """
        self.texts, self._file = texts, file
        self._settings = {**settings, "input": texts.fingerprint}
        saved = None if file is None else load_done(file, self._settings)
        self.is_new = saved is None
        self.done: dict[str, Any] = {
            "cursor": None,
            **dict.fromkeys(("num_records", "num_texts", "num_tokens", "num_bad", "num_skipped"), 0),
            "named": [],
            **counts,
            **(saved or {}),
        }
        texts.num_bad, texts.num_skipped, texts.named = (self.done[x] for x in ("num_bad", "num_skipped", "named"))

    def records(self) -> Iterator[InputRecord]:
        """The records that are still to be read, those without a text too."""
        return self.texts.records(self.done["cursor"], self.done["num_records"])

    def save(self) -> None:
        """Notes what is done, in one stroke."""
        if self._file is not None:
            save_done(self._file, self._settings, self.done)

    def run(
        self, what: str, groups: Iterable[Sequence[R]], work: Callable[[Sequence[R]], None], *, most: int | None = None
    ) -> Throughput:
        """Works on one group after the other; `work` adds to the counts of `done`.

        Args:
            what: what the progress bar counts.
            most: how many texts `groups` has, where it is not all of them.
        """
        before, start = dict(self.done), time.perf_counter()
        position = before["num_records"] if most is None else before["num_texts"]
        with progress_bar(what, most or self.texts.total, position) as show:
            for group in groups:
                work(group)
                self.done |= {"cursor": group[-1].cursor, "num_records": group[-1].number + 1}
                self.done |= {x: getattr(self.texts, x) for x in ("num_bad", "num_skipped", "named")}
                self.save()
                show(self.done["num_records" if most is None else "num_texts"])
        num_texts, num_tokens = (self.done[x] - before[x] for x in ("num_texts", "num_tokens"))
        return Throughput(num_texts=num_texts, num_tokens=num_tokens, seconds=time.perf_counter() - start)

    def finish(self) -> None:
        """Forgets the progress: the result is there."""
        if self._file is not None:
            self._file.unlink()


def progress_file(output: Path) -> Path:
    """Where a job that writes `output` notes what is done."""
    return output.with_name(f"{output.name}.progress.json")


def cut_in_groups(records: Iterable[InputRecord], size: int, num_chars: int) -> Iterator[list[InputRecord]]:
    """Groups of `size` records; a group ends before that when it has so many characters."""
    group: list[InputRecord] = []
    chars = 0
    for record in records:
        group.append(record)
        chars += len(record.text or "")
        if len(group) == size or chars >= num_chars:
            yield group
            group, chars = [], 0
    if group:
        yield group


@contextmanager
def appending(job: TextJob, output: Path) -> Iterator[Callable[[Iterable[str]], None]]:
    """For a job that writes lines: adds lines to `output` after those of the groups that are done. Its counts have
    `bytes`.

    Raises:
        JobError: the output exists and is no unfinished one, or is shorter than what is done.
    """
    if job.is_new:
        check_absent(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        job.save()
    with output.open("ab") as out:
        if out.tell() < job.done["bytes"]:
            raise JobError(
                f"{output} has {out.tell():,} bytes, and {job.done['bytes']:,} of it were written: it was changed; "
                f"delete it and {progress_file(output)} to start again"
            )
        out.truncate(job.done["bytes"])

        def add(lines: Iterable[str]) -> None:
            for line in lines:
                out.write(f"{line}\n".encode())
            out.flush()
            os.fsync(out.fileno())
            job.done["bytes"] = out.tell()

        yield add
