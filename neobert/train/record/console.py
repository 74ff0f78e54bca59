"""What a run says: the console, and the same lines as plain text in `training.log`. Only rank 0 speaks.

Everything that is printed while a bar is shown goes through `Reporter.say`, which prints above it; what libraries print
or log comes above it too.
"""

import atexit
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import TextIOBase
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from neobert.cli import protect_output
from neobert.secrets import scrub
from neobert.terminal import build_progress, is_interactive

MOST_LETTERS = 200
"""Of a value in the table of settings."""


class Reporter:
    """Prints to the console and to a plain-text file; keeps the progress bar below the printed lines."""

    def __init__(self, *, active: bool, show_progress: bool, mode: Literal["auto", "plain", "quiet"] = "auto") -> None:
        """`mode` is `trainer.console`."""
        protect_output()  # A run that is started from Python has no command around it.
        self._active, self._is_quiet = active, mode == "quiet"
        self._started = time.perf_counter()
        self._console = Console(quiet=not active, highlight=False)
        self._is_watched = active and mode == "auto" and is_interactive(self._console)
        self._file: Path | None = None
        self._early: list[tuple[Any, ...]] = []
        # Without a terminal the bar would only add control characters to somebody's log.
        # It goes when it is over: the last lines say what it said.
        self._progress = build_progress(self._console, active=self._is_watched and show_progress, transient=True)
        self._task: Any = None

    def open_file(self, path: Path) -> None:
        """From here on, and with everything said so far, the lines also go to `path`."""
        if not self._active:
            return
        path.touch()  # A folder that cannot be written ends the run before anything expensive.
        self._file = path
        for items in self._early:
            self._append(*items)
        self._early.clear()

    def say(self, *items: Any, style: str | None = None, always: bool = False) -> None:
        """Prints text, without secrets, or a rich renderable; `always`: in quiet mode too. Text is never wrapped: a
        path stays on one line."""
        if not self._active:
            return
        items = tuple(scrub(x) if isinstance(x, str) else x for x in items)
        if always or not self._is_quiet:
            self._console.print(*items, markup=False, soft_wrap=all(isinstance(x, str) for x in items), style=style)
        self._record(*items)

    def _record(self, *items: Any) -> None:
        if self._file is None:
            self._early.append(items)
        else:
            self._append(*items)

    def _append(self, *items: Any) -> None:
        """Writes to the file, which is open for this one line: it is complete whatever ends the run, and nobody has to
        close it."""
        assert self._file is not None
        # A full disk costs lines of training.log, not the run.
        with suppress(OSError), self._file.open("a", encoding="utf-8", errors="backslashreplace") as handle:
            Console(file=handle, width=160, no_color=True, highlight=False).print(*items, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}", style="yellow", always=True)

    def show_settings(self, lines: Sequence[str], changed: Mapping[str, Mapping[str, str]]) -> None:
        """Prints the config: `changed`, what differs from the defaults, as a table on a terminal; `lines` elsewhere and
        in the file.

        Args:
            changed: section -> key -> value as text.
        """
        if not self._is_watched:
            self.say("\n".join(lines), style="dim")
            return
        self._console.print("settings that are not the defaults (--print-config prints all)", style="dim")
        self._console.print(build_settings_table(changed, self._console.width))
        self._record(scrub("\n".join(lines)))

    @property
    def seconds(self) -> float:
        """Since this start of the run began."""
        return time.perf_counter() - self._started

    def start_progress(self, *, done: int, total: int) -> None:
        """Shows the bar from step `done` on."""
        if self._task is not None:  # The run went back to a checkpoint.
            self.advance(done)
            return
        self._task = self._progress.add_task("training", total=total, completed=done)
        # Whatever ends the process, the terminal gets its cursor back.
        atexit.register(self._progress.stop)
        self._progress.start()
        if not self._progress.disable:
            _log_above_bar()

    def advance(self, step: int) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=step)

    def note(self, *notes: str) -> None:
        """Texts beside the bar, the most important first: those that fit are shown."""
        if self._task is not None:
            self._progress.update(self._task, notes=notes)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A second bar, for something inside the run; the function it gives advances it by one."""
        task = self._progress.add_task(what, total=total)
        try:
            yield lambda: self._progress.advance(task)
        finally:
            self._progress.remove_task(task)

    def stop_progress(self) -> None:
        self._progress.stop()


def _log_above_bar() -> None:
    """Log handlers that kept the stream which they found write to the one of now, through which lines come above the
    bar."""
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    for handler in (handler for logger in loggers for handler in logger.handlers):
        if not isinstance(handler, logging.StreamHandler) or isinstance(handler, logging.FileHandler):
            continue
        if isinstance(handler.stream, TextIOBase) and handler.stream.isatty():
            handler.setStream(sys.stderr)


def build_settings_table(changed: Mapping[str, Mapping[str, str]], width: int) -> RenderableType:
    """Key and value by section; of a long value its first letters. Where there is little room a value has a line of its
    own."""
    longest = max((len(key) for keys in changed.values() for key in keys), default=0)
    beside = width - longest - 4 >= width // 3
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=beside, overflow="fold")
    table.add_column(overflow="fold")
    for section, keys in changed.items():
        table.add_row(Text(section, "bold"))
        for key, value in keys.items():
            name, text = Text(f"  {key}", "dim"), Text(_shorten(scrub(value)))
            if beside:
                table.add_row(name, text)
            else:
                table.add_row(name)
                table.add_row(Padding(text, (0, 0, 0, 4)))
    return table


def _shorten(value: str) -> str:
    if len(value) <= MOST_LETTERS:
        return value
    return f"{value[:MOST_LETTERS]}... ({len(value):,} letters; config.yaml has all)"
