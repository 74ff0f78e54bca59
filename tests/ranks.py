"""Several ranks in one process: a thread each, with collectives made of a barrier."""

import threading
from collections.abc import Callable
from typing import Any

import torch


class ThreadRuntime:
    """What collectives on the host need of a `Runtime`."""

    heartbeat = None

    def __init__(self, rank: int, world: int, table: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world, self._table, self._barrier = rank, world, table, barrier
        self.num_collectives = 0
        self.gathered: list[Any] = []
        """What every rank was given of every rank: its size grows with the number of ranks."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather_objects(self, value: Any, *, patient: bool = False) -> list[Any]:
        self.gathered.append(value)
        return self._gather(value)

    def _gather(self, value: Any) -> list[Any]:
        self.num_collectives += 1
        self._table[self.rank] = value
        self._barrier.wait(timeout=20)
        gathered = list(self._table)
        self._barrier.wait(timeout=20)
        return gathered

    def broadcast_object(self, value: Any) -> Any:
        return self.gather_objects(value)[0]

    def from_main(self, values: torch.Tensor) -> torch.Tensor:
        return self._gather(values)[0].clone()

    def gather_to_main(self, value: Any, *, patient: bool = False) -> list[Any] | None:
        gathered = self._gather(value)
        return gathered if self.is_main else None

    def object_from_main(self, value: Any, *, patient: bool = False) -> Any:
        return self._gather(value)[0]

    def sum_on_host(self, values: list[int], *, patient: bool = False) -> list[int]:
        return [sum(column) for column in zip(*self._gather(values))]


def outcome_of(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`work`, which returns the error that it raises."""

    def guarded(runtime: Any) -> Any:
        try:
            return work(runtime)
        except Exception as error:
            return error

    return guarded


def run_ranks(world: int, work: Callable[[Any], Any]) -> list[Any]:
    """`work(runtime)` on every rank; the results in rank order."""
    table, barrier, results = [None] * world, threading.Barrier(world), [None] * world

    def body(rank: int) -> None:
        results[rank] = work(ThreadRuntime(rank, world, table, barrier))

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
