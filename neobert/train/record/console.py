"""What a run says: the console, and the same lines as plain text in `training.log`. Only rank 0 speaks."""

import atexit
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from neobert.cli import protect_output
from neobert.secrets import scrub


class Reporter:
    """Prints to the console and to a plain-text file; keeps the progress bar below the printed lines."""

    def __init__(self, *, active: bool, show_progress: bool) -> None:
        protect_output()  # A run that is started from Python has no command around it.
        self._active = active
        self._console = Console(quiet=not active, highlight=False)
        self._file: Path | None = None
        self._early: list[tuple[Any, ...]] = []
        # Without a terminal the bar would only add control characters to somebody's log.
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (active and show_progress and self._console.is_terminal),
        )
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

    def say(self, *items: Any, style: str | None = None) -> None:
        """Prints text, without secrets, or a rich renderable. Text is never wrapped: a path stays on one line."""
        if not self._active:
            return
        items = tuple(scrub(x) if isinstance(x, str) else x for x in items)
        self._console.print(*items, markup=False, soft_wrap=all(isinstance(x, str) for x in items), style=style)
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
        self.say(f"warning: {text}", style="yellow")

    def start_progress(self, *, done: int, total: int) -> None:
        """Shows the bar from step `done` on."""
        if self._task is not None:  # The run went back to a checkpoint.
            self.advance(done)
            return
        self._task = self._progress.add_task("steps", total=total, completed=done)
        # Whatever ends the process, the terminal gets its cursor back.
        atexit.register(self._progress.stop)
        self._progress.start()

    def advance(self, step: int) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=step)

    def stop_progress(self) -> None:
        self._progress.stop()
