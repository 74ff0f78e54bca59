"""Pairs per second and peak memory of contrastive steps: unpadded and padded, cached gradients and the whole batch.

python scripts/benchmarks/contrastive.py --model outputs/run --pairs my_pairs.jsonl --batch-size 64
"""

import sys

from neobert import cli
from neobert.contrastive.benchmark_flags import parse_flags


def main() -> None:
    args = parse_flags(sys.argv[1:], str(__doc__))
    from neobert.contrastive.pair_benchmark import run_benchmark

    run_benchmark(args)


if __name__ == "__main__":
    cli.run(main, also=(ValueError,))
