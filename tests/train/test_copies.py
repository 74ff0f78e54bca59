"""Batches reach the device in a stream of their own; the garbage collector skips what lives as long as a run."""

import gc
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from neobert.config.schema import Config
from neobert.train.loop import training_steps
from neobert.train.run import build_run
from neobert.train.step import BatchCopier
from neobert.types import PackedBatch, StepBatch, TrainState


def first_batch(config: Config) -> StepBatch:
    run = build_run(config)
    loader = run.data.loader(None)
    try:
        return next(loader)
    finally:
        loader.close()
        run.runtime.close()


def test_on_a_cpu_a_batch_stays_where_it_is(tiny: Callable[..., Config], tmp_path: Path) -> None:
    batch = first_batch(tiny(tmp_path / "run"))
    moved = BatchCopier(torch.device("cpu")).copy(batch)
    assert moved.micro_batches[0].input_ids is batch.micro_batches[0].input_ids
    assert moved.state == batch.state


def test_compute_waits_for_the_copy_and_keeps_its_memory(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of calls, with streams that write down what is asked of them."""
    keys = ("trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2")
    batch = first_batch(tiny(tmp_path / "run", *keys))
    calls: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Any) -> None:
            calls.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def inside(stream: Stream) -> Any:
        calls.append(f"enter {stream.name}")
        yield
        calls.append(f"leave {stream.name}")

    def to(self: PackedBatch, device: torch.device, *, non_blocking: bool = False) -> PackedBatch:
        calls.append(f"copy to {device}, non-blocking {non_blocking}")
        return self

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("compute"))
    monkeypatch.setattr(PackedBatch, "to", to)
    monkeypatch.setattr(PackedBatch, "record_stream", lambda self, stream: calls.append(f"kept for {stream.name}"))
    BatchCopier(torch.device("cuda:0")).copy(batch)
    assert calls == [
        "enter side",
        "copy to cuda:0, non-blocking True",
        "copy to cuda:0, non-blocking True",
        "leave side",
        "compute waits for side",
        "kept for compute",
        "kept for compute",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_arrive_on_a_gpu(tiny: Callable[..., Config], tmp_path: Path) -> None:
    batch = first_batch(tiny(tmp_path / "run"))
    copier = BatchCopier(torch.device("cuda", 0))
    for _ in range(20):
        torch.cuda._sleep(10**6)  # The compute stream is behind, as in training.
        moved = copier.copy(batch).micro_batches[0]
        total = moved.input_ids.sum() + moved.segments.ids.sum()
        del moved
        original = batch.micro_batches[0]
        assert total.item() == int(original.input_ids.sum() + original.segments.ids.sum())


def test_the_garbage_collector_passes_over_what_lives_after_the_first_step(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    run = build_run(tiny(tmp_path / "run", "trainer.eval_steps=0", "trainer.save_steps=0"))
    gc.unfreeze()  # Python 3.12 starts with some of its own.
    steps = training_steps(run, TrainState())
    next(steps)
    frozen = gc.get_freeze_count()
    assert frozen > 10_000
    next(steps)
    assert gc.get_freeze_count() <= frozen, "frozen once"
    steps.close()
    assert gc.get_freeze_count() == 0, "another run in this process starts as this one did"
    run.runtime.close()
