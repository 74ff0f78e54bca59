"""Time of every optimizer's step as a share of the training step, and how orthogonal Muon's updates are.

python scripts/benchmarks/optimizers.py --steps 10
python scripts/benchmarks/optimizers.py --preset neobert --length 1024 --rows 64 --device cuda
"""

import argparse

from neobert import cli
from neobert.benchmark.flags import count, count_or_zero, device
from neobert.benchmark.settings import PRESETS, StepSettings
from neobert.output import print_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    for flag, default in (("--length", 512), ("--rows", 8), ("--steps", 10)):
        parser.add_argument(flag, type=count, default=default, help="default: %(default)s")
    parser.add_argument("--warmup", type=count_or_zero, default=2, help="default: %(default)s")
    parser.add_argument("--device", type=device, default="cpu", help="default: %(default)s")
    parser.add_argument("--width", type=count, default=256, help="side of the matrices made orthogonal")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread, for a busy machine")
    values = vars(parser.parse_args())
    width, cpu_time = values.pop("width"), values.pop("cpu_time")
    from neobert.benchmark.optimizer_cost import (
        describe_orthogonality,
        describe_times,
        measure_orthogonality,
        measure_times,
    )

    print_result(describe_times(measure_times(StepSettings(**values), cpu_time=cpu_time)))
    print_result(describe_orthogonality(measure_orthogonality(width=width)))


if __name__ == "__main__":
    cli.run(main)
