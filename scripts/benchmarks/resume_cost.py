"""Seconds to the first batch of a resumed run at 1%, 50% and 99% of an epoch, streamed and indexed.

python scripts/benchmarks/resume_cost.py FILES --tokenizer FOLDER
"""

from neobert import cli
from neobert.benchmark.arguments import build_data_parser, read_data_config


def main() -> None:
    args = build_data_parser(__doc__, rows=16, repeats=5).parse_args()
    given = read_data_config(args)
    from neobert.benchmark.resume_cost import measure

    measure(*given, (0.01, 0.5, 0.99), args.repeats)


if __name__ == "__main__":
    cli.run(main)
