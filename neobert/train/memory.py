"""What to say when the memory does not suffice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from neobert.train.host_memory import is_out_of_memory
from neobert.train.run import Run
from neobert.types import MicroBatch


class OutOfMemory(Exception):
    """A step needed more memory than there is; the message has its shape and the keys to change."""


@contextmanager
def memory_explained(run: Run, batch: MicroBatch, task: Literal["train", "eval"]) -> Iterator[None]:
    """Raises OutOfMemory, with the allocator's error as its cause, when the block runs out of memory.

    The run ends there: a smaller batch tried in silence would be another run.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        rows, slots = batch.num_rows, batch.num_slots // batch.num_rows
        peak = run.runtime.peak_memory_bytes() / 2**30
        message = (
            f"out of memory after step {run.tracker.step} in {_WORDS[task]} of {rows} rows of {slots} slots on "
            f"{run.runtime.device}, at a peak of {peak:.2f} GiB; lower trainer.per_device_{task}_batch_size "
            f"({rows} rows){_REMEDIES[task]}"
        )
        run.tracker.event("out_of_memory", run.tracker.step, rows=rows, slots=slots, peak_gib=peak)
        raise OutOfMemory(message) from error


_WORDS = {"train": "a training micro-batch", "eval": "an evaluation batch"}
_REMEDIES = {
    "train": ", with trainer.global_batch_size to keep the rows of a step; or set trainer.gradient_checkpointing: true "
    "or a smaller dataset.max_seq_length",
    "eval": ", which changes no result",
}
