"""How much a config learns in seven minutes of training: python scripts/experiments/yardstick.py CONFIG --data FOLDER

Prints one JSON line with the held-out loss (nats per masked token), the steps, tokens and seconds of training. The
speed is measured first, on a throw-away run, to know how many steps fit.
"""

import json
import sys

from neobert import cli
from neobert.benchmark.flags import build_parser, count, parse_arguments
from neobert.config.load import load_config
from neobert.output import print_result

SECONDS = 417.0
"""Seven minutes without three seconds: the training time of the runs that the yardstick was first read from."""

SPEED_STEPS = 50


def main() -> int:
    parser = build_parser(__doc__, file_help="config of the run")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of training (default %(default)s)")
    parser.add_argument("--steps", type=count, help="make so many steps, whatever the time: repeats an earlier run")
    parser.add_argument("--speed-steps", type=count, default=SPEED_STEPS, help="of the throw-away run (default 50)")
    options, overrides = parse_arguments(parser, sys.argv[1:])
    config = load_config(
        options.file, [*overrides, "trainer.max_steps=1"]
    )  # What is wrong is said before libraries are loaded.
    from neobert.benchmark.trial import Stopped, check_data, settle_precision, use_threads
    from neobert.benchmark.yardstick import measure, measure_steps
    from neobert.cli import EXIT_CODES

    use_threads(options.threads)
    check_data(options.data)
    overrides += settle_precision(config)
    try:
        num_steps = options.steps or measure_steps(
            options.file, overrides, seconds=options.seconds, steps=options.speed_steps
        )
        result = measure(options.file, overrides, options.output, num_steps=num_steps, data=options.data)
    except Stopped as stopped:
        cli.say(f"error: the run stopped early ({stopped.reason})")
        return EXIT_CODES[stopped.reason]
    budget = None if options.steps else options.seconds
    given = {"config": str(options.file), "settings": overrides, "budget_seconds": budget}
    print_result(json.dumps(given | result))
    return 0


if __name__ == "__main__":
    cli.run(main)
