"""How long a resumed run waits for its first batch, at several positions of an epoch.

One pass over the data is made for its states; then a loader is opened at each of them, several times, in turn. What is
measured is the opening alone: from the state to the first batch of a step, in the calling thread.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from neobert.config.schema import Config
from neobert.data.pipeline import DataPipeline, Reader
from neobert.data.rows.lanes import State
from neobert.data.tokenizer import Tokenizer
from neobert.train.build import build_config_data


def build(config: Config, tokenizer: Tokenizer, folder: Path) -> DataPipeline:
    """The data of one process, read in the calling thread."""
    alone = replace(config, dataset=replace(config.dataset, num_workers=0))
    return build_config_data(
        alone, tokenizer, Reader(rows_per_step=config.trainer.micro_batch_rows, prepared_dir=folder)
    )


def find_states(data: DataPipeline, fractions: Sequence[float]) -> list[State]:
    """States at these fractions of the first epoch: of the steps until half of the lanes have ended it."""
    loader, states = data.loader(), []
    for step in loader:
        states.append(step.state)
        if sum(lane["epoch"] > 0 for lane in step.state["lanes"].values()) * 2 >= data.train.order.num_lanes:
            break
    loader.close()
    return [states[int(fraction * (len(states) - 1))] for fraction in fractions]


def seconds_to_first_batch(data: DataPipeline, state: State) -> float:
    start = time.perf_counter()
    loader = data.loader(state)
    next(loader)
    seconds = time.perf_counter() - start
    loader.close()
    return seconds


def measure(
    config: Config, tokenizer: Tokenizer, fractions: Sequence[float], repeats: int, say: Callable[[str], None] = print
) -> None:
    """Prints a table: seconds to the first batch at each fraction, streamed and from disk."""
    columns = " | ".join(f"{fraction:.0%}" for fraction in fractions)
    say(f"| seconds to the first batch at | {columns} | bytes of state |\n|---|{'---|' * len(fractions)}---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, streaming in (("streamed", True), ("indexed", False)):
            data = build(replace(config, dataset=replace(config.dataset, streaming=streaming)), tokenizer, Path(folder))
            states = find_states(data, fractions)
            seconds: list[list[float]] = [[] for _ in fractions]
            for _ in range(repeats):
                for found, state in zip(seconds, states):
                    found.append(seconds_to_first_batch(data, state))
            size = max(len(json.dumps(state)) for state in states)
            say(f"| {name} | {' | '.join(f'{statistics.median(s):.2f}' for s in seconds)} | {size:,} |")
