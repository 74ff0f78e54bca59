"""Long jobs that continue where they were killed: a small JSON file says what is done; files appear whole or not."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from neobert.config.nesting import parse_json
from neobert.data.fingerprint import fits
from neobert.disk import write_text
from neobert.errors import UserError


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


@contextmanager
def progress_bar(what: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar on the error output where that is a terminal; the function it gives takes what is done now."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda now: bar.update(task, completed=now)
