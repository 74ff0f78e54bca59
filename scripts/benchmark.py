"""Tokens per second, utilisation and memory of the training step, on made-up rows or on those of a config.

python scripts/benchmark.py --preset small --precision bf16
python scripts/benchmark.py --preset neobert --length 1024 --rows 64 --device cuda --compile
python scripts/benchmark.py --config configs/pretraining/quickstart.yaml dataset.max_seq_length=128
"""

import dataclasses
import json

from neobert import cli
from neobert.benchmark.step_command import build_parser, opened_rows, read_settings
from neobert.output import print_result


def main() -> None:
    args = build_parser(__doc__).parse_args()
    settings = read_settings(args)
    from neobert.benchmark.step_time import describe, measure_step

    with opened_rows(args) as source:
        figures = measure_step(settings, source)
    both = {"settings": dataclasses.asdict(settings), **dataclasses.asdict(figures)}
    print_result(json.dumps(both) if args.json else describe(settings, figures))


if __name__ == "__main__":
    cli.run(main, also=(ValueError,))
