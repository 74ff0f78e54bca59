"""From lanes to optimizer steps: which rows a rank gets, in which micro-batches, and where the run is after them.

Row g comes from lane g modulo the number of lanes and goes to rank g modulo the number of ranks. Step s takes the next
B(s) rows. Nothing else decides, so ranks, threads and read-ahead are free to change between two starts.
Every rank reads the lanes that hold rows of its own; it skips the rows of others without touching their tokens.

The state of the order is the number of the next row and, for each lane, the state that opens its current window: a
few kilobytes that travel with every batch. Save the state of the batch that was trained on, and the next start
continues after it.
"""

import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import numpy as np

from neobert.data.rows.batch_size import BatchSchedule
from neobert.data.rows.collate import build_row, join_rows
from neobert.data.rows.lanes import Lane, RowOrder, State, Window
from neobert.data.rows.packing import Piece, max_segments_per_row, next_fit
from neobert.errors import DataError
from neobert.types import MicroBatch, PackedRow, StepBatch


class Collate(Protocol):
    """Rows to a micro-batch, purely: `neobert.data.rows.collate.Collator` in pretraining."""

    def __call__(self, rows: Sequence[PackedRow], *, step: int) -> MicroBatch:
        """The rows as they are trained on at `step`."""


VERSION = 2
"""Of the state; raised when the order of rows or masks changes."""

POLL_SECONDS = 0.1
"""Between two looks at whether to stop while a batch is waited for."""


ORDER_KEYS = {
    "seed": "seed",
    "num_lanes": "dataset.num_lanes",
    "window_documents": "dataset.window_documents",
    "max_seq_length": "dataset.max_seq_length",
    "min_length": "dataset.min_length",
    "truncate": "tokenizer.truncation",
    "shuffle": "dataset.shuffle_buffer_size",
    "max_document_chars": "dataset.max_document_chars",
    "packing": "datacollator.pack_sequences, trainer.enforce_full_packed_batches",
}
"""Field of `RowOrder` -> the config key that makes it."""


def check_state(state: State, order: RowOrder) -> None:
    """Raises when a saved state belongs to another order of rows.

    Raises:
        DataError: with every difference and the key that makes it.
    """
    if state.get("version") != VERSION:
        raise DataError(
            f"the saved data state has version {state.get('version')}, this code writes {VERSION}: it cannot continue "
            "that order of rows; start fresh with another trainer.output_dir"
        )
    changed = [
        f"{ORDER_KEYS[name]} was {state.get(name)!r} and is {value!r}"
        for name, value in asdict(order).items()
        if state.get(name) != value
    ]
    if changed:
        raise DataError(f"the saved data order cannot be continued: {'; '.join(changed)}. Set the old values again")


def merge_states(states: Sequence[State]) -> State:
    """One state from those of all ranks after the same step.

    Raises:
        DataError: ranks disagree about the next row or about a lane that both read.
    """
    digests = [state["next_batch_digest"] for state in states]
    merged: State = {**states[0], "lanes": {}}
    total = None if None in digests else sum(int(digest, 16) for digest in digests) % 2**64
    merged["next_batch_digest"] = None if total is None else f"{total:016x}"
    for rank, state in enumerate(states):
        if state["next_row"] != merged["next_row"]:
            raise DataError(f"rank {rank} is at row {state['next_row']}, rank 0 at row {merged['next_row']}")
        for lane, lane_state in state["lanes"].items():
            if merged["lanes"].setdefault(lane, lane_state) != lane_state:
                raise DataError(
                    f"rank {rank} and a rank before it read lane {lane} differently: a file differs on their machines, "
                    "or one could not read it (dataset.on_bad_shard: skip); restore it, and resume"
                )
    merged["lanes"] = dict(sorted(merged["lanes"].items(), key=lambda item: int(item[0])))
    return merged


class _LaneRows:
    """The rows of the lanes that a rank reads, and the windows that threads open ahead of their first row."""

    def __init__(
        self, open_lane: Callable[[int], Lane], lanes: Sequence[int], saved: dict[str, State], num_workers: int
    ) -> None:
        self._open_lane = open_lane
        self._lanes: dict[int, Lane] = {}
        self._states = {int(lane): state for lane, state in saved.items()}
        self._windows: dict[int, Window] = {}
        self._ahead: dict[int, Future[Window]] = {}
        self._pool = ThreadPoolExecutor(num_workers, "windows") if num_workers else None
        self._untouched = list(lanes)
        for _ in range(num_workers):
            self._begin_next()

    def take(self, number: int) -> tuple[list[Piece], Window]:
        """The next row of a lane, and the window that has its tokens."""
        if number not in self._windows:
            state = self._entry_state(number)
            self._windows[number] = self._wait(number, state)
            self._states[number] = state
            self._begin_next()
        while True:
            state, window = self._states[number], self._windows[number]
            row = state["row"]
            if row < len(window.rows):
                self._states[number] = {**state, "row": row + 1}
                if 2 * row >= len(window.rows):
                    self._open_ahead(number, window.next_state)
                return window.rows[row], window
            self._windows[number] = self._wait(number, window.next_state)
            self._states[number] = window.next_state

    def snapshot(self) -> dict[str, State]:
        """States by lane number, of the lanes that have produced a row of this run."""
        return {str(number): dict(state) for number, state in sorted(self._states.items())}

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _lane(self, number: int) -> Lane:
        if number not in self._lanes:
            self._lanes[number] = self._open_lane(number)
        return self._lanes[number]

    def _entry_state(self, number: int) -> State:
        return self._states[number] if number in self._states else self._lane(number).start()

    def _begin_next(self) -> None:
        """Has a thread open one more lane."""
        self._untouched = [number for number in self._untouched if number not in self._windows]
        waiting = [number for number in self._untouched if number not in self._ahead]
        if waiting:
            self._open_ahead(waiting[0], self._entry_state(waiting[0]))

    def _open_ahead(self, number: int, state: State) -> None:
        if self._pool is not None and number not in self._ahead:
            self._ahead[number] = self._pool.submit(self._lane(number).open, state)

    def _wait(self, number: int, state: State) -> Window:
        future = self._ahead.pop(number, None)
        return self._lane(number).open(state) if future is None else future.result()


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderSettings:
    """How rows are shared out. None of this changes what the rows are."""

    batch: BatchSchedule
    """Rows of each step, over ranks and micro-batches; with next_fit, documents instead of rows."""

    micro_batch_rows: int
    rank: int = 0
    world: int = 1
    num_workers: int = 1
    """0: everything in the calling thread. n: one thread that makes batches and n that open windows ahead."""

    prefetch_steps: int = 4
    pin_memory: bool = False
    is_ready: Callable[[int], bool] = lambda step: True
    """Whether the batch of a step can be made yet, which a thread that is ahead waits for. Once a step was trained, the
    batches of the next two can."""


def _merge(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers in ranges that rise and do not meet.

    >>> _merge([(6, 8), (1, 3), (2, 4)])
    [(1, 4), (6, 8)]
    """
    merged: list[tuple[int, int]] = []
    for start, end in sorted(map(tuple, ranges)):  # Lists, where a checkpoint had them.
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


class _Assembler:
    """Makes the batches of one rank, step by step."""

    def __init__(
        self,
        open_lane: Callable[[int], Lane],
        order: RowOrder,
        settings: LoaderSettings,
        collate: Collate,
        cls_id: int,
        sep_id: int,
        state: State | None,
        skip: Sequence[tuple[int, int]],
        step: int,
    ) -> None:
        self._order, self._settings, self._collate = order, settings, collate
        self._skip, self._step = _merge(skip), step
        self._cls_id, self._sep_id = cls_id, sep_id
        self._next_row: int = 0 if state is None else state["next_row"]
        # Documents that share a row by next_fit must go to one rank: then whole micro-batches take turns, not rows.
        self._unit = settings.micro_batch_rows if order.packing == "next_fit" else 1
        cycle = math.lcm(order.num_lanes, self._unit * settings.world)
        mine = list(dict.fromkeys(row % order.num_lanes for row in range(cycle) if self._is_mine(row)))
        saved = {} if state is None else {n: s for n, s in state["lanes"].items() if int(n) in set(mine)}
        first = [lane for lane in mine if lane >= self._next_row % order.num_lanes]
        lanes = [*first, *(lane for lane in mine if lane not in set(first))]
        self._reads = np.zeros(order.num_lanes, dtype=bool)
        self._reads[mine] = True
        self._lane_rows = _LaneRows(open_lane, lanes, saved, settings.num_workers)

    @property
    def is_ready(self) -> bool:
        return self._settings.is_ready(self._step)

    def step(self) -> StepBatch:
        """The micro-batches of this rank's next optimizer step, and the state after them."""
        settings, rows = self._settings, []
        first, self._next_row = self._next_row, self._end(self._next_row, settings.batch(self._step))
        # The rows of all ranks are numbers in an array; only those of lanes that this rank reads are looked at.
        numbers = np.arange(first, self._next_row)
        for row in numbers[self._reads[numbers % self._order.num_lanes]].tolist():
            pieces, window = self._lane_rows.take(row % self._order.num_lanes)
            if self._is_mine(row) and not any(start <= row < end for start, end in self._skip):
                rows.append(build_row(pieces, window, row, cls_id=self._cls_id, sep_id=self._sep_id))
        starts = range(0, len(rows), settings.micro_batch_rows)
        batches = [self._micro_batch(rows[start : start + settings.micro_batch_rows]) for start in starts]
        self._step += 1
        state = {
            "version": VERSION,
            "next_row": self._next_row,
            **asdict(self._order),
            "lanes": self._lane_rows.snapshot(),
        }
        return StepBatch(micro_batches=tuple(batches), state=state)

    def close(self) -> None:
        self._lane_rows.close()

    def _end(self, first: int, count: int) -> int:
        """The row after the next `count` rows that are not skipped."""
        end = first + count
        for start, stop in self._skip:
            if first < stop and start < end:
                end += stop - max(start, first)
        return end

    def _is_mine(self, row: int) -> bool:
        return (row // self._unit) % self._settings.world == self._settings.rank

    def _micro_batch(self, rows: list[PackedRow]) -> MicroBatch:
        if self._order.packing == "next_fit":
            length = self._order.max_seq_length
            limit = max_segments_per_row(length, packed=True)
            plan = next_fit([len(row.tokens) for row in rows], length, limit)
            rows = [join_rows([rows[item] for item in items]) for items in plan]
        batch = self._collate(rows, step=self._step)
        return batch.pin_memory() if self._settings.pin_memory else batch


class Loader:
    """Endless iterator over the optimizer steps of one rank.

    With `num_workers` 0 everything happens in `next`. Otherwise a thread makes batches ahead; an error in it is raised
    by the `next` that would have returned that batch, with its own traceback. Call `close` when done.

    Raises:
        DataError: the batch cannot be shared out, or `state` belongs to another order of rows.
    """

    def __init__(
        self,
        open_lane: Callable[[int], Lane],
        *,
        order: RowOrder,
        settings: LoaderSettings,
        collate: Collate,
        cls_id: int,
        sep_id: int,
        state: State | None = None,
        skip: Sequence[tuple[int, int]] = (),
        step: int = 0,
    ) -> None:
        """`skip` holds half-open ranges of row numbers that are planned like all rows, so that the others stay what
        they are, and never returned. `step` is the number of the first step to make: it decides about the number of
        rows and the fraction of masked tokens."""
        per_micro_step = settings.world * settings.micro_batch_rows
        for rows in (settings.batch.rows, settings.batch.start_rows):
            if rows % per_micro_step:
                key = "" if rows == settings.batch.rows else f"trainer.batch_size_warmup_start: {rows}: "
                raise DataError(
                    f"{key}a step of {rows} rows cannot be shared by {settings.world} processes with "
                    f"trainer.per_device_train_batch_size: {settings.micro_batch_rows}; it must be a multiple of "
                    f"{per_micro_step}"
                )
        if state is not None:
            check_state(state, order)
        uneven = [(start, end) for start, end in skip if (end - start) % per_micro_step]
        if uneven:
            raise DataError(
                f"the rows {uneven} that this run skips cannot be left out evenly by {settings.world} processes "
                f"with trainer.per_device_train_batch_size: {settings.micro_batch_rows}; their number must be a "
                f"multiple of {per_micro_step}"
            )
        self._assembler = _Assembler(open_lane, order, settings, collate, cls_id, sep_id, state, skip, step)
        self._stop = threading.Event()
        self._ready: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=max(1, settings.prefetch_steps))
        self._ahead: StepBatch | BaseException | None = None
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        if settings.num_workers:
            self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
            self._thread.start()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        step = self.next_unless(lambda: False)
        assert step is not None, "nothing stops it"
        return step

    def next_unless(self, stop: Callable[[], bool]) -> StepBatch | None:
        """The next step, or None when `stop()` is true before a thread has made it."""
        if self._failure is not None:
            raise self._failure
        item: StepBatch | BaseException | None = self._produce() if self._thread is None else None
        while item is None:
            if stop():
                return None
            with suppress(queue.Empty):
                item = self._ready.get(timeout=POLL_SECONDS)
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        return item

    def close(self) -> None:
        """Stops the threads and waits for them."""
        self._stop.set()
        # Room in the queue lets a thread that waits to put its batch see the signal at once.
        with suppress(queue.Empty):
            while True:
                self._ready.get_nowait()
        if self._thread is not None:
            self._thread.join()
        self._assembler.close()

    def _produce(self) -> StepBatch | BaseException:
        """The next step, whose state has the digest of the one after it: a resumed run compares its first batch."""
        item = self._assemble() if self._ahead is None else self._ahead
        if isinstance(item, BaseException):
            return item
        self._ahead = self._assemble()
        digest = None if isinstance(self._ahead, BaseException) else f"{self._ahead.digest:016x}"
        return replace(item, state={**item.state, "next_batch_digest": digest})

    def _assemble(self) -> StepBatch | BaseException:
        while self._thread is not None and not self._assembler.is_ready:
            if self._stop.wait(POLL_SECONDS / 10):
                return RuntimeError("the loader is closed")
        try:
            return self._assembler.step()
        except Exception as error:
            return error

    def _run(self) -> None:
        while not self._stop.is_set():
            item = self._produce()
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
