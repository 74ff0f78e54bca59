"""Seconds to the first batch of a resumed run at 1%, 50% and 99% of an epoch, streamed and indexed.

python scripts/benchmarks/resume_cost.py FILES --tokenizer FOLDER
"""

import sys

from neobert.benchmark.arguments import build_data_parser, run_on_data
from neobert.benchmark.resume_cost import measure


def main() -> int:
    args = build_data_parser(__doc__, rows=16, repeats=5).parse_args()
    return run_on_data(args, lambda *given: measure(*given, (0.01, 0.5, 0.99), args.repeats))


if __name__ == "__main__":
    sys.exit(main())
