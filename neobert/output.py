"""Standard output and error that cannot fail a command.

They are for people: a reader that is gone, a full disk, a closed stream or a terminal without UTF-8 costs lines, never
the work behind them. What a command is asked for and writes there goes through `print_result`, which says when it was
lost.
"""

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

OUTPUT_LOST = 74
READER_GONE = 141
"""Exit codes; the second is what shells report of a program that SIGPIPE ended."""


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
    """From here on nothing that is printed raises. A stream that somebody put in the place of Python's is left alone.

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
        SystemExit: it was not taken: quietly when the reader is gone (`| head`), else with a sentence.
    """
    print(text, end=end, flush=True)
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # There is no buffer between with `python -u`.
    failure = raw.failure if isinstance(raw, _Output) else None
    if failure is None:
        return
    if failure.errno == errno.EPIPE:
        raise SystemExit(READER_GONE)
    print(f"error: the result could not be written to the standard output ({failure.strerror})", file=sys.stderr)
    raise SystemExit(OUTPUT_LOST)
