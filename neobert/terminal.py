"""What a terminal shows beside lines: progress bars, and errors in a box. Elsewhere there are lines alone."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.rule import Rule
from rich.text import Text

NARROW, WIDE = 60, 100
"""Columns of a terminal below which a bar has no room for itself, and from which it has for all."""

REFRESHES = 2.0
"""Of a bar in a second: drawing takes about a millisecond of the core that trains."""


def is_interactive(console: Console) -> bool:
    """Whether somebody watches: a terminal that can move its cursor, not in CI and without NO_COLOR."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("CI", "").lower() not in ("", "0", "false")
    return console.is_terminal and not console.is_dumb_terminal and not plain


class Notes(ProgressColumn):
    """The texts of the field `notes`, as many as fit into the columns that the count of steps leaves of `room`."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def render(self, task: Task) -> Text:
        room, shown = self._room - 2 * len(f"{task.total or 0:.0f}"), ""
        for note in task.fields.get("notes", ()):
            longer = f"{shown} {note}".lstrip()
            if len(longer) > room:
                break
            shown = longer
        return Text(shown, no_wrap=True)


def build_progress(console: Console, *, active: bool = True, transient: bool = False, counts: bool = True) -> Progress:
    """Bars that fit a terminal of this width; a task has a description, and notes in its field `notes`. Without a
    terminal, or not `active`, nothing is shown. `counts`: steps are shown as `12/30`, else as a percentage."""
    width, done = console.width, MofNCompleteColumn() if counts else TaskProgressColumn()
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False)]
    if width < NARROW:
        columns += [TaskProgressColumn(), Notes(width - 16), TimeRemainingColumn()]
    elif width < WIDE:
        columns += [BarColumn(bar_width=10), done, Notes(width - 33), TimeRemainingColumn()]
    else:
        columns += [BarColumn(bar_width=20), done, Notes(width - 55)]
        columns += [TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn()]
    return Progress(
        *columns,
        console=console,
        disable=not (active and is_interactive(console)),
        transient=transient,
        refresh_per_second=REFRESHES,
        # What goes to a file stays out of the terminal.
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )


def is_watched() -> bool:
    """Whether somebody watches both outputs of this process."""
    return is_interactive(Console()) and is_interactive(Console(stderr=True))


@contextmanager
def progress_bar(
    what: str, total: int | None, done: int = 0, *, active: bool = True
) -> Iterator[Callable[[int], None]]:
    """A bar on the error output where that is a terminal; the function it gives takes what is done now."""
    with build_progress(Console(stderr=True, highlight=False), active=active) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda now: bar.update(task, completed=now)


_BULLET = re.compile(r"\s*(?:- )?")
_NAMED = re.compile(r"(?P<key>--[\w-]+|[a-z_]+(?:\.[\w\[\]]+)+)(?P<value>: \S+)?")


_LONG = re.compile(r"\S{400,}")
"""No path is as long."""


_REMEDY = re.compile(
    r"(?:or )?(?:add|choose|continue|correct|delete|fix|free|give|install|keep|leave|lower|make|move|name|pass|prepare"
    r"|put|raise|remove|rename|run|see|set|start|take|try|use|write)\b"
)
"""How a remedy starts."""


def describe_error(sentence: str) -> Text:
    """An error with its key and value marked, and what comes after a semicolon in a line of its own: the remedy."""
    text, sentence = Text(), _LONG.sub(lambda long: f"{long[0][:100]}... ({len(long[0]):,} letters)", sentence)
    for number, line in enumerate(sentence.splitlines()):
        bullet = _BULLET.match(line)
        assert bullet is not None, "it matches anything"
        problem, *others = line[bullet.end() :].split("; ")
        text.append("\n" if number else "").append(bullet.group())
        if (found := _NAMED.match(problem)) is not None:
            text.append(found["key"], "bold red").append(found["value"] or "", "bold")
        text.append(problem if found is None else problem[found.end() :])
        for other in others:
            is_remedy = _REMEDY.match(other) is not None
            text.append("\n" + " " * (bullet.end() + 2) + "fix: " * is_remedy)
            text.append(other, "green" if is_remedy else "")
    return text


def show_error(sentence: str) -> bool:
    """Shows an error in a box where the error output is a terminal; False elsewhere, where nothing is shown.

    The box is open at its sides: a path or a command can be copied, whatever the width.
    """
    console = Console(stderr=True, highlight=False)
    if not is_interactive(console):
        return False
    console.print(Rule("error", align="left", style="red"))
    console.print(describe_error(sentence), soft_wrap=True)
    console.print(Rule(style="red"))
    return True
