"""Time and memory of the loss kernels, forward and backward.

python scripts/benchmarks/loss_kernels.py --device cuda
"""

import argparse

from neobert import cli
from neobert.benchmark.flags import count, device
from neobert.benchmark.settings import SHAPES
from neobert.output import print_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=["torch", "reference", "triton", "liger"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"], help="default: %(default)s")
    parser.add_argument("--device", type=device, default="cpu", help="default: %(default)s")
    parser.add_argument("--repeats", type=count, default=3, help="default: %(default)s")
    args = parser.parse_args()
    from neobert.benchmark.loss_kernels import table

    print_result(table(args.kernels, args.shapes, args.precision, args.device, args.repeats))


if __name__ == "__main__":
    cli.run(main, also=(ValueError,))
