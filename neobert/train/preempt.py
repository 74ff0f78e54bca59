"""Stopping in order: by a signal, by the clock, or because the numbers are bad.

SIGTERM, SIGHUP, SIGUSR1 and SIGINT only set a flag: a save from within a handler could catch the optimizer in the
middle of a step. The flag travels with the one host-side sum that every step makes anyway, so all ranks stop after the
same step; a rank that waits for data or evaluates looks at it too. A second SIGINT ends the process at once, which
leaves nothing torn, because a checkpoint gets its name by a rename.

`trainer.max_hours` is a flag of the same kind, set by rank 0 when the time left is that of one step and one save.
"""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

from neobert.cli import show_cursor, stop_signals

FIRST_SAVE_SECONDS = 60.0
FIRST_SAVE_FRACTION = 0.05
"""What a save may take before one was measured: this long, but no more than this fraction of `trainer.max_hours`."""

Reason = Literal["preempted", "out_of_time", "numbers"]


class StopRequest:
    """Who asked this run to stop. `reason` is agreed upon by all ranks; everything else is this process's own."""

    def __init__(self, *, max_hours: float | None, is_main: bool) -> None:
        self.reason: Reason | None = None
        self.signal_name: str | None = None
        """The first signal received."""

        self._started = time.monotonic()
        self._limit = None if max_hours is None or not is_main else 3600 * max_hours
        self._step_seconds: deque[float] = deque(maxlen=20)
        self._save_seconds: float | None = None
        self._interrupted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals set the flag instead of ending the process. Outside the main thread Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in (*stop_signals(), signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                # None: a handler that was not set from Python and cannot be set from here.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def requests(self) -> list[int]:
        """[a signal was received, the time is up] as 0 or 1, to be summed over ranks and handed to `agree`."""
        return [int(self.signal_name is not None), int(self._time_is_up())]

    def requested(self) -> bool:
        """Whether this process asks to stop."""
        return any(self.requests())

    def agree(self, num_signalled: int, num_out_of_time: int) -> bool:
        """Takes the sums of all ranks' requests; whether to stop."""
        if self.reason is None and num_signalled:
            self.reason = "preempted"
        elif self.reason is None and num_out_of_time:
            self.reason = "out_of_time"
        return self.reason is not None

    @contextmanager
    def timing_step(self) -> Iterator[None]:
        """Around a step, so that `trainer.max_hours` leaves room for one."""
        start = time.monotonic()
        yield
        self._step_seconds.append(time.monotonic() - start)

    @contextmanager
    def timing_save(self) -> Iterator[None]:
        """Around a save, so that `trainer.max_hours` leaves room for the slowest so far."""
        start = time.monotonic()
        yield
        self.note_save(time.monotonic() - start)

    def note_save(self, seconds: float) -> None:
        """A save took so long, whether training waited for it or not."""
        self._save_seconds = max(self._save_seconds or 0.0, seconds)

    def _time_is_up(self) -> bool:
        if self._limit is None:
            return False
        save = self._save_seconds
        if save is None:
            save = min(FIRST_SAVE_SECONDS, FIRST_SAVE_FRACTION * self._limit)
        return time.monotonic() - self._started + max(self._step_seconds, default=0.0) + save >= self._limit

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            show_cursor()
            os._exit(130)
        self._interrupted = self._interrupted or number == signal.SIGINT
        # Nothing is printed here: the signal may have come in the middle of a print.
        self.signal_name = self.signal_name or signal.Signals(number).name
