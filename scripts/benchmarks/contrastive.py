"""Pairs per second and peak memory of contrastive steps: unpadded and padded, cached gradients and the whole batch.

python scripts/benchmarks/contrastive.py --model outputs/run --pairs my_pairs.jsonl --batch-size 64
"""

import sys

from neobert.contrastive.benchmark import run_benchmark


def main() -> int:
    try:
        return run_benchmark(sys.argv[1:], str(__doc__))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
