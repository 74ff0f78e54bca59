"""Work of many threads, done by one: what waits together is computed together.

A model runs one batch at a time. While it does, requests of other threads wait; then those of the same kind that wait
become one call, whose texts are packed by length. A request that fails in such a call is tried alone, so that it fails
alone.
"""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

Work = Callable[[Any, Sequence[Any]], Sequence[Any]]
"""(kind, items) -> a result for each item."""


class Overloaded(Exception):
    """Too many requests wait."""


class Closed(Exception):
    """The batcher computes no more."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Queued:
    kind: Hashable
    items: Sequence[Any]
    num_tokens: int
    done: "Future[Sequence[Any]]" = field(default_factory=Future)


class Batcher:
    """Runs `work` in a thread of its own.

    Args:
        work: Called with a kind and the items of one or more requests of that kind.
        max_tokens: A call with several requests has at most so many.
        max_waiting: Requests that may wait; one more is refused.
    """

    def __init__(self, work: Work, *, max_tokens: int, max_waiting: int) -> None:
        self._work, self._max_tokens, self._max_waiting = work, max_tokens, max_waiting
        self._waiting: deque[_Queued] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests that wait now, those that are computed not counted."""
        return len(self._waiting)

    def compute(self, kind: Hashable, items: Sequence[Any], num_tokens: int) -> Sequence[Any]:
        """Results for the items, computed with those of other threads.

        Raises:
            Overloaded: as many requests wait as may.
            Closed: `close` was called.
            Exception: what the work raised for these items.
        """
        request = _Queued(kind=kind, items=items, num_tokens=num_tokens)
        with self._changed:
            if self._is_closed:
                raise Closed
            if len(self._waiting) >= self._max_waiting:
                raise Overloaded
            self._waiting.append(request)
            self._changed.notify()
        return request.done.result()

    def close(self) -> None:
        """Computes what waits, then ends the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                group = self._take_group()
            self._answer(group)

    def _take_group(self) -> list[_Queued]:
        """The first request and all others of its kind, in their order, that fit beside it."""
        group: list[_Queued] = []
        free = self._max_tokens
        for request in list(self._waiting):
            fits = request.kind == group[0].kind and request.num_tokens <= free if group else True
            if fits:
                group.append(request)
                self._waiting.remove(request)
                free -= request.num_tokens
        return group

    def _answer(self, group: Sequence[_Queued]) -> None:
        try:
            results = self._work(group[0].kind, [item for request in group for item in request.items])
        except Exception as error:
            if len(group) == 1:
                group[0].done.set_exception(error)
                return
            for request in group:
                self._answer([request])
            return
        start = 0
        for request in group:
            request.done.set_result(results[start : start + len(request.items)])
            start += len(request.items)
