"""The yardstick, how much a config learns in a fixed time: train for so many seconds, then score held-out documents.

A learning-rate schedule needs the number of steps before the first one. So a throw-away run of the same config makes
some steps first, its speed times the seconds gives the number of steps, and the run itself makes exactly that many. The
seconds that it took are reported beside the budget: they differ where the machine was slower or faster than in the
throw-away run.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neobert.benchmark.trial import (
    HELD_OUT,
    describe_machine,
    read_speed,
    score,
    train,
)
from neobert.config.load import load_config


def measure_steps(file: Path, overrides: Sequence[str], *, seconds: float, steps: int) -> int:
    """Steps that fit into `seconds`, by the speed of a run of `steps`, of which the first fifth is left out."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "speed"
        config = load_config(
            file,
            [
                *overrides,
                f"trainer.max_steps={steps}",
                f"trainer.logging_steps={max(1, steps // 5)}",
                "trainer.save_model=false",
                "trainer.eval_strategy=no",
                "trainer.eval_max_batches=1",
                f"trainer.output_dir={run}",
            ],
        )
        train(config)
        return max(1, round(read_speed(run).steps_per_second * seconds))


def measure(file: Path, overrides: Sequence[str], output: Path, *, num_steps: int, data: Path) -> dict[str, Any]:
    """Trains and scores: the figures of the run."""
    config = load_config(
        file,
        [
            *overrides,
            f"trainer.max_steps={num_steps}",
            "trainer.overwrite_output_dir=true",
            f"trainer.output_dir={output}",
        ],
    )
    train(config)
    loss = score(output, data, device="cpu" if config.trainer.means_cpu else "auto")
    return {
        "loss": loss.loss,
        "accuracy": loss.accuracy,
        "num_targets": loss.num_targets,
        "num_documents": loss.num_documents,
        **dataclasses.asdict(read_speed(output)),
        **describe_machine(),
        "held_out": dataclasses.asdict(HELD_OUT),
    }
