"""A rank that is stopped, dead or stuck ends the others with its name; what is known of beats, and real processes."""

import os
import select
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from children import fork, wait_for
from poison import fork_run
from ports import free_port

from neobert.cli import EXIT_CODES
from neobert.config.schema import Config
from neobert.train import loop
from neobert.train.processes import heartbeat
from neobert.train.processes.heartbeat import BROKEN_SECONDS, STOPPING_SECONDS, Beat, RankLostError, Watch, is_of_peers

LIVE = Beat(where="step 7", is_patient=False, host="node1")
Change = Callable[[Beat, int], Beat]


def judge(*changes: Change, moments: int, timeout: float = 60) -> list[str | None]:
    """Verdicts of each second, of ranks whose beats are those of a live rank, changed."""
    watch = Watch(timeout, 1.0)
    return [
        watch.judge({rank: change(replace(LIVE, number=now), now) for rank, change in enumerate(changes)})
        for now in range(moments)
    ]


def lives(beat: Beat, now: int) -> Beat:
    return beat


def stops_at_5(beat: Beat, now: int) -> Beat:
    return replace(beat, number=min(now, 5))


def test_a_rank_without_beats_is_lost_after_the_timeout_and_not_before() -> None:
    found = judge(lives, lives, stops_at_5, moments=66)
    assert found[:65] == [None] * 65
    assert str(found[65]).startswith("rank 2 on node1 has ended or does not run")
    assert "last seen in step 7" in str(found[65])
    assert judge(lives, lives, moments=200) == [None] * 200


@pytest.mark.parametrize(("flag", "seconds"), [("is_stopping", STOPPING_SECONDS), ("is_broken", BROKEN_SECONDS)])
def test_it_is_sooner_when_another_rank_is_asked_to_stop_or_a_collective_has_failed(flag: str, seconds: float) -> None:
    found = judge(lambda beat, now: replace(beat, **{flag: True}), stops_at_5, moments=40)  # type: ignore[arg-type]
    assert [text is None for text in found].index(False) == 5 + seconds


def test_a_rank_that_others_wait_for_is_stuck_in_a_step_and_may_take_long_elsewhere() -> None:
    def ahead(beat: Beat, now: int) -> Beat:
        return replace(beat, arrivals=9)

    def late(beat: Beat, now: int) -> Beat:
        return replace(beat, arrivals=8)

    def saves(beat: Beat, now: int) -> Beat:
        return replace(beat, arrivals=8, is_patient=True)

    def advances(beat: Beat, now: int) -> Beat:
        return replace(beat, arrivals=now // 50)

    found = judge(ahead, late, ahead, moments=62)
    assert found[:59] == [None] * 59
    assert "rank 1 on node1 is stuck" in str(found[61])
    assert judge(ahead, saves, moments=200) == [None] * 200
    assert judge(late, late, moments=200) == [None] * 200, "all compute a long step"
    assert judge(lambda beat, now: replace(beat, arrivals=now // 50 + 1), advances, moments=400) == [None] * 400


def test_a_rank_that_hangs_in_its_backward_has_not_started_the_collective_of_the_others() -> None:
    def waits(beat: Beat, now: int) -> Beat:
        return replace(beat, arrivals=9, collectives=4)

    def hangs(beat: Beat, now: int) -> Beat:
        return replace(beat, arrivals=9, collectives=3)

    def next_step(beat: Beat, now: int) -> Beat:
        return replace(beat, arrivals=10, collectives=0)

    assert "rank 1 on node1 is stuck" in str(judge(waits, hangs, waits, moments=62)[61])
    assert "rank 0 on node1 is stuck" in str(judge(waits, next_step, moments=62)[61])
    assert judge(waits, waits, moments=200) == [None] * 200


def test_the_error_of_a_rank_is_quoted() -> None:
    found = judge(lives, lambda beat, now: replace(beat, ended="OutOfMemoryError: CUDA"), moments=1)
    assert "rank 1 on node1 has ended: OutOfMemoryError: CUDA; it was last seen in step 7" in str(found[0])


def test_what_is_an_error_of_peers() -> None:
    assert is_of_peers(RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed"))
    assert not is_of_peers(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert RankLostError.outcome in EXIT_CODES


# ---- real processes ----


def before_step(number: int, harm: Callable[[], None], *, work: str = "take_step") -> Callable[[], None]:
    """What makes a rank do `harm` before its step of this number, or before its data, in a forked child."""

    def install() -> None:
        real, calls = getattr(loop, work), count(1)

        def harmed(*arguments: Any) -> Any:
            if next(calls) == number:
                harm()
            return real(*arguments)

        setattr(loop, work, harmed)

    return install


def in_backward_of_step(number: int, harm: Callable[[], None]) -> Callable[[], None]:
    """What makes a rank do `harm` when the gradients of its step of this number are computed."""

    def install() -> None:
        real, calls = loop.take_step, count(1)

        def harmed(run: loop.Run, *arguments: Any) -> Any:
            if next(calls) == number:
                run.module.head_weight.register_hook(lambda gradient: harm())
            return real(run, *arguments)

        loop.take_step = harmed

    return install


def fail() -> None:
    raise ValueError("a cosmic ray")


HARMS: dict[str, tuple[Callable[[], None], str]] = {
    "stopped": (lambda: os.kill(os.getpid(), signal.SIGSTOP), "has ended or does not run"),
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "has ended or does not run"),
    "stuck": (lambda: threading.Event().wait(), "is stuck"),
    "failed": (fail, "has ended: ValueError: a cosmic ray"),
}


@pytest.mark.parametrize("kind", HARMS)
@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_rank_ends_and_names_it_and_the_step(
    tiny: Callable[..., Config], tmp_path: Path, kind: str, rank: int
) -> None:
    """Here rank 0 keeps the store. Where it is gone or stopped, that is what the other one says."""
    harm, sentence = HARMS[kind]
    config = tiny(tmp_path / "run", "trainer.rank_timeout_seconds=2", "trainer.per_device_train_batch_size=2")
    port, logs = free_port(), [tmp_path / f"rank-{number}.txt" for number in (0, 1)]
    # Stuck is rank 0 in reading its data, and rank 1 in its backward pass.
    install = before_step(3, harm, work="next_batch" if kind == "stuck" else "take_step")
    if kind == "stuck" and rank == 1:
        install = in_backward_of_step(3, harm)
    before = [install if number == rank else lambda: None for number in (0, 1)]
    children = [
        fork_run(config, log, before[number], rank=number, world=2, port=port) for number, log in enumerate(logs)
    ]
    try:
        code = wait_for(children[1 - rank], 120)
    finally:
        os.kill(children[rank], signal.SIGKILL)
        wait_for(children[rank])
    printed = logs[1 - rank].read_text()
    assert code == EXIT_CODES["rank_lost"], printed
    last = printed.splitlines()[-1]
    if rank == 0 and kind != "stuck":
        assert "error: rank 0 " in last
    else:
        assert f"rank {rank} on " in last
        assert sentence in last
        # A rank that ends at once was last seen a beat before.
        where = {"stuck": ("the data of step 3", "step 3")[rank], "failed": "step 3"}.get(kind, "")
        assert f"last seen in {where}" in last


def test_ranks_end_without_their_launcher(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """Their store is not its own here, as on every machine but the first, and both hang. A pipe that all three have
    open says when they have ended."""
    config = tiny(tmp_path / "run", "trainer.rank_timeout_seconds=600", "trainer.per_device_train_batch_size=2")
    port, logs = free_port(), [tmp_path / f"rank-{number}.txt" for number in (0, 1)]
    ours, theirs = os.pipe()

    def hang() -> None:
        os.write(theirs, b"x")
        threading.Event().wait()

    def launch() -> int:
        os.environ["TORCHELASTIC_RUN_ID"] = "any"
        for number, log in enumerate(logs):
            fork_run(config, log, before_step(3, hang), rank=number, world=2, port=port)
        threading.Event().wait()
        return 0

    launcher = fork(launch, tmp_path / "launcher.txt")
    os.close(theirs)
    try:
        for _ in logs:
            assert read_within(ours, 60) == b"x"
    finally:
        os.kill(launcher, signal.SIGKILL)
        wait_for(launcher)
    assert read_within(ours, 60) == b""
    for log in logs:
        assert "error: the launcher of this process" in log.read_text().splitlines()[-1]


def read_within(descriptor: int, seconds: float) -> bytes:
    """One byte of a pipe, none when nobody can write any more."""
    assert select.select([descriptor], [], [], seconds)[0], "nothing came"
    return os.read(descriptor, 1)


def test_a_request_to_stop_while_another_rank_is_stopped_does_not_wait_for_the_timeout(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path / "run", "trainer.rank_timeout_seconds=600", "trainer.per_device_train_batch_size=2")
    port, logs = free_port(), [tmp_path / f"rank-{number}.txt" for number in (0, 1)]
    stop, terminate = (lambda: os.kill(os.getpid(), signal.SIGSTOP)), (lambda: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 0.25)
    monkeypatch.setattr(heartbeat, "STOPPING_SECONDS", 1.0)  # How long it is by itself is seen above.
    children = [
        fork_run(config, log, before_step(3, harm), rank=number, world=2, port=port)
        for number, (log, harm) in enumerate(zip(logs, (terminate, stop)))
    ]
    try:
        code = wait_for(children[0], 120)
    finally:
        os.kill(children[1], signal.SIGKILL)
        wait_for(children[1])
    assert code == EXIT_CODES["rank_lost"], logs[0].read_text()
    assert "rank 1 on " in logs[0].read_text().splitlines()[-1]
