"""How far a long reading of documents has come: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from neobert.secrets import scrub

LINE_SECONDS = 10.0
"""Between two lines where there is no terminal."""


class Meter:
    """Shows documents, tokens, tokens per second, and the share done where the size is known.

    Used as a context; the numbers given to `show` are totals, those before the first call do not count for the speed.
    """

    def __init__(self, label: str, *, console: Console | None = None) -> None:
        self._label = label = scrub(label)
        self._console = console or Console(file=sys.stderr, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[line]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task(label, total=None, line="")
        self._first_tokens: int | None = None
        self._started = self._shown = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, documents: int, tokens: int, share: float | None) -> None:
        """Totals so far; cheap enough to be called for every document."""
        now = time.monotonic()
        if self._first_tokens is None:
            self._first_tokens, self._started = tokens, now
        if now - self._shown < (0.2 if self._console.is_terminal else LINE_SECONDS):
            return
        self._shown = now
        speed = (tokens - self._first_tokens) / max(now - self._started, 1e-9)
        line = f"{documents:,} documents, {tokens:,} tokens, {speed:,.0f} tokens/s"
        if self._console.is_terminal:
            self._progress.update(self._task, line=line, completed=share, total=None if share is None else 1.0)
            return
        done = "" if share is None else f" ({share:.0%})"
        self._console.print(f"{self._label}: {line}{done}", soft_wrap=True, markup=False)
