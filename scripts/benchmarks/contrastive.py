"""Pairs per second and peak memory of contrastive steps: unpadded and padded, cached gradients and the whole batch.

python scripts/benchmarks/contrastive.py --model outputs/run --pairs my_pairs.jsonl --batch-size 64
"""

import sys

from neobert.benchmark.flags import exit_code
from neobert.contrastive.benchmark import run_benchmark

if __name__ == "__main__":
    sys.exit(exit_code(lambda: run_benchmark(sys.argv[1:], str(__doc__))))
