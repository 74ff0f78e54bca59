"""How every command begins and ends: output that cannot fail it, signals, and errors of one sentence.

Nothing heavy is imported here, and scripts import their libraries after their arguments are read, so that `--help` and
wrong calls answer at once.
"""

import locale
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from neobert.errors import UserError
from neobert.output import protect_output
from neobert.secrets import scrub

WRONG_CALL = 2
STOPPED = 75
INTERRUPTED = 130

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Requests to stop: of a scheduler, of a terminal that is closed, and before a time limit."""

_RESUMES = "the same command resumes where it stopped"


def run(main: Callable[[], int | None], *, also: tuple[type[Exception], ...] = (), resumes: bool = False) -> NoReturn:
    """Ends the process with what `main` returns (None is 0), or with the code of its error.

    Args:
        main: reads the arguments, then imports what it needs.
        also: errors beside UserError that are the user's to correct.
        resumes: the same command continues where it was, after an interruption or a full disk.
    """
    protect_output()
    _take_files_as_utf8()
    correctable: tuple[type[Exception], ...] = (UserError, *also, *([OSError] if resumes else []))
    try:
        with _stopped_by_signals():
            code = main() or 0
    except correctable as error:
        is_passing = isinstance(error, OSError) and resumes
        say(f"error: {_describe(error)}" + (f"; fix that, and {_RESUMES}" if is_passing else ""))
        code = WRONG_CALL
    except (KeyboardInterrupt, _Stopped) as stopped:
        say(f"stopped; {_RESUMES}" if resumes else "stopped")
        code = STOPPED if isinstance(stopped, _Stopped) else INTERRUPTED
    raise SystemExit(code)


def say(*lines: str) -> None:
    """Prints to the error output, without secrets: results alone go to the standard output."""
    for line in lines:
        print(scrub(line), file=sys.stderr)


def _take_files_as_utf8() -> None:
    """Text files are UTF-8 in a locale that has another encoding too; the terminal keeps its own."""
    if locale.getencoding().lower() not in ("utf-8", "utf8"):
        with suppress(locale.Error):  # A system without that locale.
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


class _Stopped(BaseException):
    """A request to stop, where nothing more orderly listens."""


def stop_signals() -> tuple[signal.Signals, ...]:
    """The requests to stop that this process obeys: STOP_SIGNALS, without SIGHUP where it is to be ignored (`nohup`).

    Under torchrun SIGHUP is obeyed whatever it was: the agent handles it under `nohup` too, and kills its processes
    half a minute later. Its option `--signals-to-handle` changes that.
    """
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    kills = "SIGHUP" in os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "")
    return tuple(x for x in STOP_SIGNALS if x is not signal.SIGHUP or kills or not ignored)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """A request to stop unwinds the command, which leaves nothing half-written under its final name."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped

    before = {number: signal.signal(number, stop) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


EXIT_CODES: dict[str, int] = {
    "finished": 0,
    "complete": 0,
    "disk": 74,
    "preempted": STOPPED,
    "out_of_time": STOPPED,
    "numbers": 76,
}
"""How a run ended -> the exit code of the script."""
