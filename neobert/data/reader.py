"""Who reads the data of a run: one of its processes, and with how many threads."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neobert.config.schema import DatasetSection
from neobert.data.batch_size import BatchSchedule
from neobert.data.loader import LoaderSettings

PREFETCH_STEPS = 4
"""Steps kept ready when `dataset.prefetch_factor` is null."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reader:
    """The process that reads: what a step takes, which share of it is this one's, and where prepared data lies."""

    rows_per_step: int
    """Global batch in rows, after a warm-up of the batch."""

    prepared_dir: Path
    """Where text that is not streamed is tokenised to, unless `dataset.pre_tokenize_output` says; used again when it
    fits."""

    rank: int = 0
    world: int = 1
    """Number of processes."""

    main_first: Callable[..., AbstractContextManager[Any]] = nullcontext
    """A context in which rank 0 runs before the others, put around the tokenising. `main_first(facts)`: what is made
    depends on these named values, which must be equal on all ranks."""

    pin_memory: bool = False
    """Whether batches go to page-locked memory as they are made."""

    def loader_settings(
        self, section: DatasetSection, *, batch: BatchSchedule, micro_batch_rows: int
    ) -> LoaderSettings:
        """How this process reads the steps of `batch`."""
        return LoaderSettings(
            batch=batch,
            micro_batch_rows=micro_batch_rows,
            rank=self.rank,
            world=self.world,
            num_workers=choose_num_workers(self.world) if section.num_workers is None else section.num_workers,
            prefetch_steps=section.prefetch_factor or PREFETCH_STEPS,
            pin_memory=self.pin_memory,
        )


def choose_num_workers(world: int) -> int:
    """Threads that open windows when `dataset.num_workers` is null: a quarter of this process's share of the cores,
    from 1 to 4. The tokenizer uses the other cores by itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = min(world, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(4, cores // local // 4))
