"""Time and memory of the loss kernels, forward and backward.

python scripts/benchmarks/loss_kernels.py --device cuda
"""

import argparse

from neobert.benchmark.loss_kernels import SHAPES, table

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", nargs="+", default=["torch", "reference", "triton", "liger"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"], help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args()
    print(table(args.kernels, args.shapes, args.precision, args.device, args.repeats))
