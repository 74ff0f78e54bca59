"""Tokens per second and packing fill of the input pipeline, against `datasets.map` with a greedy collator.

python scripts/benchmarks/input_pipeline.py FILES --tokenizer FOLDER
"""

import sys

from neobert.benchmark.arguments import build_data_parser, run_on_data
from neobert.benchmark.flags import count
from neobert.benchmark.input_pipeline import compare


def main() -> int:
    parser = build_data_parser(__doc__, rows=8, repeats=3)
    parser.add_argument("--batches", type=count, default=2000, help="batches of one measurement (default: %(default)s)")
    args = parser.parse_args()
    return run_on_data(args, lambda *given: compare(*given, args.files, args.batches, args.repeats))


if __name__ == "__main__":
    sys.exit(main())
