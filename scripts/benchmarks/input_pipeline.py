"""Tokens per second and packing fill of the input pipeline, against `datasets.map` with a greedy collator.

python scripts/benchmarks/input_pipeline.py FILES --tokenizer FOLDER
"""

from neobert import cli
from neobert.benchmark.arguments import build_data_parser, read_data_config
from neobert.benchmark.flags import count


def main() -> None:
    parser = build_data_parser(__doc__, rows=8, repeats=3)
    parser.add_argument("--batches", type=count, default=2000, help="batches of one measurement (default: %(default)s)")
    args = parser.parse_args()
    given = read_data_config(args)
    from neobert.benchmark.input_pipeline import compare

    compare(*given, args.files, args.batches, args.repeats)


if __name__ == "__main__":
    cli.run(main)
