"""Notices a rank that is gone or stuck, and ends the others with a sentence that says which and where.

A process that waits in a collective cannot be interrupted, and what a collective says of a peer that is gone is an
address. So each rank has a thread that writes a beat every second into the store through which the ranks found each
other: a number that grows, how many collectives on the host its main thread has reached, and what it is doing. Rank 0
reads all beats, the others read rank 0's and its verdict: the cost is one reader of all, however many ranks there are,
and two look-ups of counters in a step. A rank is lost when

- its beat has not changed for `trainer.rank_timeout_seconds`: stopped, swapped out, its machine or network gone; after
  a request to stop for `STOPPING_SECONDS`, and when a collective has failed for `BROKEN_SECONDS`;
- it said that it ends with an error;
- in a step it has not started the collective that the others wait in for that time: a read that hangs, or a kernel of
  a GPU, is late for one on the host; a backward pass that hangs is late for one of the gradients, which torch counts.

The others then print the verdict and end at once, from the thread. Time is counted in beats of the reader, so a rank
that was stopped itself and continues does not take the others for dead. A rank whose launcher has ended without ending
it ends too: nothing else would.
"""

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, _world

from neobert.cli import EXIT_CODES, say_error, show_cursor
from neobert.errors import UserError
from neobert.host import launcher_is_gone

INTERVAL_SECONDS = 1.0
STOPPING_SECONDS = 15.0
"""Without a beat, when a rank was asked to stop: less than schedulers leave after SIGTERM."""

BROKEN_SECONDS = 5.0
"""Without a beat, when a collective has failed: one rank is lost, and the question is which."""

PATIENCE = timedelta(days=7)
"""How long processes wait for each other at the start, as for rank 0 to tokenise; one that dies is noticed at once."""

_VERDICT = "verdict"
_ADVICE = "continue from the newest checkpoint with --trainer.resume_from_checkpoint latest"
_ORPHAN = f"the launcher of this process (torchrun, accelerate launch) was killed and did not end it; {_ADVICE}"
_built = 0


class RankLostError(UserError):
    """Another rank has ended or does not answer."""

    outcome = "rank_lost"


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """What a rank says of itself."""

    number: int = 0
    arrivals: int = 0
    """Collectives on the host that its main thread has reached."""

    collectives: int = 0
    """Collectives that it has started in what it is doing, of gradients too."""

    where: str = "the start"
    is_patient: bool = True
    """What it does there may take long: the others wait for as long as it lives."""

    is_stopping: bool = False
    """It was asked to stop."""

    is_broken: bool = False
    """One of its collectives has failed."""

    ended: str | None = None
    """The error it ends with."""

    host: str = ""

    @property
    def progress(self) -> tuple[int, int]:
        """Grows from collective to collective."""
        return self.arrivals, self.collectives


class Watch:
    """What is known of the beats of some ranks; a call of `judge` is a moment."""

    def __init__(self, timeout: float, interval: float) -> None:
        self._timeout, self._interval = timeout, interval
        self._beats: dict[int, Beat] = {}
        self._silent: dict[int, int] = {}
        self._late: dict[int, int] = {}

    def judge(self, beats: Mapping[int, Beat]) -> str | None:
        """Which rank is lost, and where; None while none is."""
        first, last = (choose(beat.progress for beat in beats.values()) for choose in (min, max))
        for rank, beat in beats.items():
            before = self._beats.get(rank, beat)
            is_waited_for = beat.progress == first < last and not beat.is_patient
            self._silent[rank] = self._silent.get(rank, 0) + 1 if before.number == beat.number else 0
            self._late[rank] = self._late.get(rank, 0) + 1 if is_waited_for and before.progress == first else 0
        self._beats = dict(beats)
        seconds = [self._timeout]
        seconds += [STOPPING_SECONDS] if any(beat.is_stopping for beat in beats.values()) else []
        seconds += [BROKEN_SECONDS] if any(beat.is_broken for beat in beats.values()) else []
        for rank, beat in beats.items():
            if beat.ended is not None:
                return describe_lost(rank, beat, f"has ended: {beat.ended}")
        for rank, beat in beats.items():
            if self._silent[rank] >= self._count(min(seconds)):
                return describe_lost(rank, beat, "has ended or does not run: it gives no sign of life")
        for rank, beat in beats.items():
            if self._late[rank] >= self._count(self._timeout):
                what = f"is stuck: it runs, and the others have waited for it for {self._timeout:g} s"
                return describe_lost(rank, beat, f"{what} (trainer.rank_timeout_seconds)")
        return None

    def _count(self, seconds: float) -> int:
        return max(3, round(seconds / self._interval))


def describe_lost(rank: int, beat: Beat, what: str) -> str:
    """The sentence that the others end with."""
    return f"rank {rank} on {beat.host} {what}; it was last seen in {beat.where}; {_ADVICE}"


def count_collectives() -> int:
    """How many this process has started so far, in all groups; no waiting."""
    groups: list[Any] = list(_world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)


class Heartbeat:
    """The beats of this rank, and the thread that reads those of others."""

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        """Says that this rank is there. Collective in that all ranks make theirs in the same order."""
        global _built
        _built += 1
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # The launcher's store outlives its processes.
        self._interval = min(INTERVAL_SECONDS, timeout / 4)
        # A connection of its own: one that waits for a key holds up all others who use it.
        store: Any = _get_default_store()
        self._store: Any = dist.PrefixStore(f"heartbeat/{attempt}/{_built}", store.clone())
        self._store.set_timeout(timedelta(seconds=timeout))
        self._rank, self._world = rank, world
        self._watch = Watch(timeout, self._interval)
        self._beat = Beat(host=socket.gethostname())  # Replaced by the main thread alone.
        self._number, self._first_collective = 0, count_collectives()
        self._closed, self._rounds = threading.Event(), 0
        self._failed_rounds = 0
        self._limit = max(3, round(timeout / self._interval))
        self.is_stopping: Callable[[], bool] = lambda: False
        """Whether this rank was asked to stop."""

        self._publish()

    def start(self) -> None:
        """From here on; when every rank has made its own."""
        for work in (self._run, self._guard):
            threading.Thread(target=work, name="heartbeat", daemon=True).start()

    def at(self, where: str, *, patient: bool) -> None:
        """What the main thread does from here on; `patient`: others wait for it for as long as it lives."""
        self._first_collective = count_collectives()
        self._beat = replace(self._beat, where=where, is_patient=patient)

    def arrive(self) -> None:
        """The main thread has reached a collective on the host."""
        self._beat = replace(self._beat, arrivals=self._beat.arrivals + 1)

    def explain(self, error: Exception) -> NoReturn:
        """After a collective has failed: ends this process with the name of the lost rank, when it is found.

        Raises:
            RankLostError: it was not found.
        """
        self._beat = replace(self._beat, is_broken=True)
        self._closed.wait(2 * BROKEN_SECONDS)
        raise RankLostError(
            f"another process of this run has ended, it is not known which: {str(error).splitlines()[0]}; {_ADVICE}"
        ) from error

    def end(self, error: BaseException) -> None:
        """Says that this rank ends with an error that the others do not know, and beats no more."""
        self._closed.set()
        self._beat = replace(self._beat, ended=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        try:
            self._publish()
        except RuntimeError:  # The store is gone: so are the others.
            return

    def close(self) -> None:
        """The run is over, on all ranks."""
        self._closed.set()

    def _publish(self) -> None:
        self._number += 1
        started = count_collectives() - self._first_collective
        beat = replace(self._beat, number=self._number, collectives=started, is_stopping=self.is_stopping())
        self._store.set(f"{self._rank}", json.dumps(asdict(beat)))

    def _read(self, *ranks: int) -> dict[int, Beat]:
        values = self._store.multi_get([str(rank) for rank in ranks])
        return {rank: Beat(**json.loads(value)) for rank, value in zip(ranks, values)}

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            try:
                self._publish()
                verdict = self._find_verdict()
                self._failed_rounds = 0
            except RuntimeError as error:  # Of the store. It ends with rank 0, or with the launcher.
                verdict = self._explain_store(str(error))
            self._rounds += 1
            if verdict is not None and not self._closed.is_set():
                _end(verdict)

    def _find_verdict(self) -> str | None:
        """What rank 0 has found, or what this rank finds of rank 0."""
        if self._store.check([_VERDICT]):
            return str(self._store.get(_VERDICT).decode())
        if self._rank:
            beat = replace(self._read(0)[0], is_stopping=self.is_stopping(), is_broken=self._beat.is_broken)
            return self._watch.judge({0: beat})
        verdict = self._watch.judge(self._read(*range(self._world)))
        if verdict is not None:
            self._store.set(_VERDICT, verdict)
            self._closed.wait(3 * self._interval)  # The others read it, from a store that may end with this process.
        return verdict

    def _explain_store(self, problem: str) -> str | None:
        self._failed_rounds += 1
        if self._failed_rounds < 3:
            return None
        return (
            f"rank 0 or its launcher has ended: the store of this run does not answer "
            f"({problem.splitlines()[0]}); {_ADVICE}"
        )

    def _guard(self) -> None:
        """Ends this process where the store does not even fail, since its process is stopped, and without a launcher,
        which keeps the store of one machine only."""
        seen, same = -1, 0
        while not self._closed.wait(self._interval):
            if launcher_is_gone():
                _end(_ORPHAN)
            same = same + 1 if seen == self._rounds else 0
            seen = self._rounds
            if same >= self._limit + 5:
                _end(f"rank 0 or its launcher does not run: the store of this run does not answer; {_ADVICE}")


def check_launcher() -> None:
    """Before this process looks for the others, whose store may have been the launcher's.

    Raises:
        RankLostError: the launcher has ended already.
    """
    if launcher_is_gone():
        raise RankLostError(_ORPHAN)


def build_heartbeat(rank: int, world: int, timeout: float | None) -> Heartbeat | None:
    """None in a single process, and without a `trainer.rank_timeout_seconds`. Collective, as `Heartbeat` is."""
    return Heartbeat(rank, world, timeout) if world > 1 and timeout is not None else None


@contextmanager
def naming_lost_ranks(heartbeat: Heartbeat | None) -> Iterator[None]:
    """Around work with collectives: one that fails ends this process with the name of the rank that is lost, and the
    others get to know of an error here.

    Raises:
        RankLostError: a collective failed, and which rank is lost was not found.
    """
    try:
        yield
    except Exception as error:
        if heartbeat is None:
            raise
        if isinstance(error, UserError):  # The others know, or have errors of their own.
            heartbeat.close()
            raise
        if is_of_peers(error):
            heartbeat.explain(error)
        heartbeat.end(error)
        raise


def is_of_peers(error: Exception) -> bool:
    """Whether a collective failed because of another process: what torch raises says so in its text alone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def choose_group_timeout(timeout: float | None) -> timedelta:
    """How long a collective waits, for a `trainer.rank_timeout_seconds`: so long that a lost rank is named before."""
    return max(timedelta(minutes=30), timedelta(seconds=2 * (timeout or 0)))


def _end(sentence: str) -> None:
    show_cursor()
    say_error(sentence)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(EXIT_CODES[RankLostError.outcome])
