"""A few steps under torch's profiler: `trainer.profiler_steps_start` and `trainer.profiler_steps`.

The window is a range of step numbers, so a resumed run profiles what is left of it, and a run resumed after it
nothing. Every profiled step is one `ProfilerStep#N` in the trace; what lies between two of them is logging, evaluating
and saving. A run that ends inside the window, in whatever way, writes the steps that it made. The profiler watches and
changes no number: losses are those of a run without it, to the last bit.

Process 0 alone is profiled. On CUDA the history of the allocator is recorded over the same steps.
"""

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from neobert.disk import replacing
from neobert.train.checkpoint.run_folder import SNAPSHOT, TRACE
from neobert.train.run import Run
from neobert.train.step import StepMetrics
from neobert.types import TrainState

DATA_WAIT = "data wait"
"""Name of the time that a step waits for its batch, in the trace."""

_MOST_ALLOCATIONS = 1_000_000
"""Entries of the allocator's history."""


class Recording:
    """The profiler while it runs."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._on_gpu = run.runtime.device.type == "cuda"
        self.steps: list[int] = []
        """Those that were made, in their order."""

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=_MOST_ALLOCATIONS)
        self._profile = profile(activities=activities)
        self._profile.start()

    def end(self) -> None:
        """Stops the profiler and writes its files; one that cannot be written is reported and left out."""
        if self._on_gpu:
            torch.cuda.synchronize(self._run.runtime.device)  # The last step's kernels belong to it.
        self._profile.add_metadata_json("profiled_steps", json.dumps(self.steps))
        self._profile.stop()
        if self.steps:
            self._write(TRACE, lambda path: self._profile.export_chrome_trace(str(path)))
            if self._on_gpu:
                self._write(SNAPSHOT, lambda path: torch.cuda.memory._dump_snapshot(str(path)))
            first, last = self.steps[0], self.steps[-1]
            self._run.tracker.say(
                f"profiled steps {first} to {last}; look at them with "
                f"`neobert analyze-profile {shlex.quote(str(self._run.output_dir))}`"
            )
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        try:
            with replacing(self._run.output_dir / name) as temporary:
                write(temporary)
        except (OSError, RuntimeError) as error:  # A picture of some steps is not worth a run.
            self._run.tracker.warn(f"{name} could not be written ({error}); the run continues without it")


def profiled(
    run: Run, state: TrainState, steps: Iterator[tuple[TrainState, StepMetrics]]
) -> Iterator[tuple[TrainState, StepMetrics]]:
    """`steps`, which continue from `state`, with those of the window under the profiler."""
    trainer = run.config.trainer
    first = trainer.profiler_steps_start
    if first is None or not run.runtime.is_main:
        yield from steps
        return
    window, recording = range(first, first + trainer.profiler_steps), None
    try:
        while True:
            number = state.step + 1
            if number in window and recording is None:
                recording = Recording(run)
            with nullcontext() if recording is None else record_function(f"ProfilerStep#{number}"):
                made = next(steps, None)
            if made is None:
                return
            state = made[0]
            if recording is not None:
                recording.steps.append(state.step)
                run.tracker.note_profiled_step()
                if state.step + 1 not in window:  # Before the step is logged: writing is slow and belongs to it.
                    recording.end()
                    recording = None
            yield made
    finally:
        if recording is not None:
            recording.end()
