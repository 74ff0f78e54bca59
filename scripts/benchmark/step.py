"""Tokens per second, utilisation and memory of the training step on random packed rows.

python scripts/benchmark/step.py --preset small --precision bf16
python scripts/benchmark/step.py --preset neobert --length 1024 --rows 64 --device cuda --compile
"""

import argparse
import dataclasses
import json
import sys

from neobert.benchmark.step import PRESETS, StepSettings, describe, measure_step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for field in dataclasses.fields(StepSettings):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            choices = {"preset": list(PRESETS), "precision": ["bf16", "fp32"]}.get(field.name)
            parser.add_argument(flag, type=type(default), default=default, choices=choices, help="default: %(default)s")
    values = vars(parser.parse_args())
    as_json = values.pop("json")
    settings = StepSettings(**values)
    try:
        figures = measure_step(settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    both = {"settings": dataclasses.asdict(settings), **dataclasses.asdict(figures)}
    print(json.dumps(both) if as_json else describe(settings, figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
