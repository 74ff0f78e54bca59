"""Tokenise a dataset once, into a folder that pretraining then reads by index.

python scripts/pretraining/tokenize_dataset.py --dataset x.jsonl --tokenizer my_tokenizer --output tokenized_data/x
python scripts/pretraining/tokenize_dataset.py --output tokenized_data/x --report

A start after an interruption, with the same flags, goes on where it was and gives the same bytes.
"""

import argparse
from pathlib import Path

from neobert import cli


def main() -> None:
    args = build_parser().parse_args()
    from neobert.commands.tokenize_dataset import run_tokenize

    run_tokenize(args)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="hub data set, local file, folder, pattern with *, or python_stdlib")
    parser.add_argument("--split", help="split, or a slice such as train[:1%%]; default: train, or the only one")
    parser.add_argument("--dataset-config", help="configuration of a hub data set, for example 20231101.en")
    parser.add_argument("--tokenizer", help="folder with a tokenizer, or a name on the hub")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; complete, or not there")
    parser.add_argument(
        "--max-length", type=int, help="cut longer documents into pieces of at most this many tokens; default: whole"
    )
    parser.add_argument("--text-column", help="default: text, content, sentence, or the only one with text")
    parser.add_argument("--num-proc", type=int, help="threads that tokenise; default: all cores")
    parser.add_argument("--max-samples", type=int, help="write only the first documents, this many")
    parser.add_argument("--no-special-tokens", action="store_true", help="leave out [CLS] and [SEP]")
    parser.add_argument(
        "--return-special-tokens-mask", action="store_true", help="add a column that is 1 at [CLS] and [SEP]"
    )
    parser.add_argument("--shard", metavar="i/n", type=parse_shard, help="write part i (from 1) of n, on this machine")
    parser.add_argument(
        "--report",
        action="store_true",
        help="measure lengths, unknown tokens and duplicates; alone: of what is in --output",
    )
    return parser


def parse_shard(word: str) -> tuple[int, int]:
    number, _, count = word.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{word!r}: write i/n with i from 1 to n, for example 1/8")
    return int(number) - 1, int(count)


if __name__ == "__main__":
    cli.run(main, resumes=True)
