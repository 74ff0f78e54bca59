"""Evaluate embeddings of any model on any set of pairs: nDCG@10 and MRR, or Spearman where the pairs have scores.

python scripts/contrastive/evaluate.py outputs/run my_pairs.jsonl
"""

import argparse

from neobert import cli
from neobert.inference.command_line import POOLING_HELP
from neobert.output import print_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run folder, checkpoint, exported folder or name of the hub")
    parser.add_argument("pairs", help="file, folder, known set or hub dataset of pairs or scored pairs")
    parser.add_argument("--split", help="split to read")
    parser.add_argument("--pooling", default="mean", help=POOLING_HELP)
    parser.add_argument("--anchor-prefix", default="", help="put before anchors")
    parser.add_argument("--positive-prefix", default="", help="put before positives and negatives")
    parser.add_argument("--max-length", type=int, help="cut texts at so many tokens; default: the model's length")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    from neobert.contrastive.evaluate import evaluate_file

    print_result(evaluate_file(args))


if __name__ == "__main__":
    cli.run(main, also=(ValueError,))
