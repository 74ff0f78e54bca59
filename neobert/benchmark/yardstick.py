"""The yardstick, how much a config learns in a fixed time: train for so many seconds, then score held-out documents.

A learning-rate schedule needs the number of steps before the first one. So a throw-away run of the same config makes
some steps first, its speed times the seconds gives the number of steps, and the run itself makes exactly that many. The
seconds that it took are reported beside the budget: they differ where the machine was slower or faster than in the
throw-away run.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neobert.benchmark.flags import count
from neobert.benchmark.trial import (
    HELD_OUT,
    Stopped,
    build_parser,
    check_data,
    describe_machine,
    parse_arguments,
    read_speed,
    score,
    settle_precision,
    train,
)
from neobert.config.load import ConfigError, load_config
from neobert.data.errors import DataError
from neobert.train.exit_codes import EXIT_CODES
from neobert.train.runtime import StartupError

SECONDS = 417.0
"""Seven minutes without three seconds: the training time of the runs that the yardstick was first read from."""

SPEED_STEPS = 50


def main(argv: Sequence[str], description: str | None = None) -> int:
    """The command line of `scripts/experiments/yardstick.py`: one JSON object on the standard output."""
    parser = build_parser(description, file_help="config of the run")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of training (default %(default)s)")
    parser.add_argument("--steps", type=count, help="make so many steps, whatever the time: repeats an earlier run")
    parser.add_argument("--speed-steps", type=count, default=SPEED_STEPS, help="of the throw-away run (default 50)")
    options, overrides = parse_arguments(parser, argv)
    try:
        check_data(options.data)
        overrides += settle_precision(load_config(options.file, [*overrides, "trainer.max_steps=1"]))
        num_steps = options.steps or measure_steps(
            options.file, overrides, seconds=options.seconds, steps=options.speed_steps
        )
        result = measure(options.file, overrides, options.output, num_steps=num_steps, data=options.data)
    except (ConfigError, StartupError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"error: the run stopped early ({stopped.reason})", file=sys.stderr)
        return EXIT_CODES[stopped.reason]
    budget = None if options.steps else options.seconds
    given = {"config": str(options.file), "settings": overrides, "budget_seconds": budget}
    print(json.dumps(given | result))
    return 0


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
    loss = score(output, data, device="cpu" if config.trainer.use_cpu else "auto")
    return {
        "loss": loss.loss,
        "accuracy": loss.accuracy,
        "num_targets": loss.num_targets,
        "num_documents": loss.num_documents,
        **dataclasses.asdict(read_speed(output)),
        **describe_machine(),
        "held_out": dataclasses.asdict(HELD_OUT),
    }
