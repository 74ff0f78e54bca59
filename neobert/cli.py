"""How every command starts and ends: output that cannot fail it, signals, and errors of one sentence.

Nothing heavy is imported here, and commands import their libraries after their arguments are read, so that `--help` and
wrong calls answer at once.

Standard output and error are for people: a reader that is gone, a full disk, a closed stream or a terminal without
UTF-8 costs lines, never the work. What a command is asked for and writes there goes through `print_result`, which says
when it was lost.
"""

import errno
import io
import locale
import os
import select
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO

from neobert.errors import UserError
from neobert.secrets import scrub

EXIT_CODES: dict[str, int] = {
    "finished": 0,
    "complete": 0,
    "wrong_call": 2,
    "rank_lost": 69,
    "disk": 74,
    "preempted": 75,
    "out_of_time": 75,
    "numbers": 76,
    "interrupted": 130,
    "reader_gone": 141,
}
"""How a command or a run ended -> its exit code. 130 and 141 are what shells report of a program that SIGINT or SIGPIPE
ended. A command that was asked a question answers 1 for no."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Requests to stop: of a scheduler, of a terminal that is closed, and before a time limit."""

_RESUMES = "the same command resumes where it stopped"


class _OutputLost(UserError):
    outcome = "disk"


# ---- ending ----


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
        say_error(_describe(error) + (f"; fix that, and {_RESUMES}" if is_passing else ""))
        code = EXIT_CODES[error.outcome if isinstance(error, UserError) else "wrong_call"]
    except (KeyboardInterrupt, _Stopped) as stopped:
        say(f"stopped; {_RESUMES}" if resumes else "stopped")
        code = EXIT_CODES["preempted" if isinstance(stopped, _Stopped) else "interrupted"]
    raise SystemExit(code)


def say(*lines: str) -> None:
    """Prints to the error output, without secrets: results alone go to the standard output."""
    for line in lines:
        print(scrub(line), file=sys.stderr)


def show_cursor() -> None:
    """For what ends a process at once: a progress bar hid the cursor of the terminal."""
    with suppress(OSError, ValueError):
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), b"\x1b[?25h\n")


def say_error(sentence: str) -> None:
    """Says why a process ends: in a box on a terminal, elsewhere in a line."""
    if sys.stderr.isatty():
        with suppress(ImportError):  # A machine that has torch alone.
            from neobert.terminal import show_error

            if show_error(scrub(sentence)):
                return
    say(f"error: {sentence}")


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


def explicit_values(args: Namespace, settings: type) -> dict[str, Any]:
    """Fields of a settings class whose flags were set; the class has the defaults of the others."""
    names = settings.__dataclass_fields__  # type: ignore[attr-defined]
    return {name: value for name, value in vars(args).items() if name in names and value is not None}


# ---- output ----


class _Output(io.FileIO):
    """A descriptor of which writing never fails: what cannot be written is dropped."""

    failure: OSError | None = None
    """The first one."""

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            try:
                written = super().write(view[done:])
            except OSError as error:
                self.failure = self.failure or error
                break
            if written is None:  # Somebody made the descriptor non-blocking.
                select.select([], [self], [])
            else:
                done += written
        return len(view)


def protect_output() -> None:
    """From here on nothing that is printed raises. A stream that replaced Python's is left alone.

    Call it before libraries are imported: their log handlers keep the stream that they find.
    """
    # A file that is opened later must not become descriptor 1 or 2, which libraries print to.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _protect(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _protect(sys.stderr, 2)


def _protect(stream: Any, number: int) -> TextIO:
    """`stream`, or /dev/null where it was closed before Python started, without errors."""
    if stream is not None:
        with suppress(OSError):
            stream.flush()
    raw = _Output(number if stream is None else stream.fileno(), "w", closefd=False)
    unbuffered = stream is not None and stream.write_through
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),  # type: ignore[arg-type]
        encoding="utf-8" if stream is None else stream.encoding,
        errors="backslashreplace",
        newline="\n",
        line_buffering=stream is not None and stream.line_buffering,
        write_through=unbuffered,
    )


def print_result(text: str, end: str = "\n") -> None:
    """Prints what the command was asked for.

    Raises:
        UserError: it was not written: the disk is full.
        SystemExit: the reader is gone (`| head`), about which nothing is said.
    """
    print(text, end=end, flush=True)
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # There is no buffer between with `python -u`.
    failure = raw.failure if isinstance(raw, _Output) else None
    if failure is None:
        return
    if failure.errno == errno.EPIPE:
        raise SystemExit(EXIT_CODES["reader_gone"])
    raise _OutputLost(f"the result could not be written to the standard output ({failure.strerror})")
