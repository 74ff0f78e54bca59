"""Find hard negatives for pairs with an encoder, and write pairs with negatives as JSON lines.

python scripts/contrastive/mine_negatives.py outputs/run my_pairs.jsonl --output my_triplets.jsonl --num-negatives 5
"""

import argparse
from pathlib import Path

from neobert import cli
from neobert.inference.command_line import POOLING_HELP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run folder, checkpoint, exported folder or name of the hub")
    parser.add_argument("pairs", help="file, folder, known set or hub dataset of pairs")
    parser.add_argument("--output", required=True, type=Path, help="file to write (.jsonl); must not exist")
    parser.add_argument("--split", help="split to read")
    parser.add_argument("--num-negatives", type=int, help="default 5")
    parser.add_argument("--margin", type=float, help="default 0.05")
    parser.add_argument("--skip", type=int, help="nearest texts passed over; default 0")
    parser.add_argument("--pooling", default="mean", help=POOLING_HELP)
    parser.add_argument("--anchor-prefix", default="", help="put before anchors")
    parser.add_argument("--positive-prefix", default="", help="put before positives")
    parser.add_argument("--max-length", type=int, help="cut texts at so many tokens; default: the model's length")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    from neobert.contrastive.mine import mine_file

    written, total = mine_file(args)
    print(f"{args.output}: {total:,} pairs, {written / total:.1f} negatives each")


if __name__ == "__main__":
    cli.run(main, also=(OSError, ValueError))
