"""The command line of the benchmark of contrastive steps."""

import argparse
from collections.abc import Sequence

VARIANTS = ("unpadded", "padded", "cached", "whole", "accumulated")
"""What can be measured; `neobert.contrastive.pair_benchmark` says what each is."""


def parse_flags(argv: Sequence[str], description: str) -> argparse.Namespace:
    """The arguments of `run_benchmark`, read without torch."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="run, checkpoint or exported folder; default: random weights of the sizes below"
    )
    parser.add_argument("--pairs", help="file or folder of pairs (needs --model); default: random texts")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--batch-size", type=int, default=32, help="pairs (default %(default)s)")
    parser.add_argument("--cached-batch-size", type=int, default=1024, help="pairs (default %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps; the median counts (default %(default)s)")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text (default %(default)s)")
    parser.add_argument("--median-length", type=float, default=16.0, help="of random texts (default %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=30592)
    parser.add_argument("--dtype", default="fp32", choices=["bf16", "fp32"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; default: torch's choice")
    args = parser.parse_args(argv)
    if args.pairs is not None and args.model is None:
        parser.error("--pairs needs --model, whose tokenizer reads them")
    return args
