"""Pseudo-perplexity of texts: python scripts/evaluation/pseudo_perplexity.py MODEL INPUT --output scores.jsonl

Every token is masked once, alone. One line of the output for each document; the figure over all of them is printed.
Type the same command again when it was interrupted.
"""

import dataclasses
import sys
from pathlib import Path

from neobert.inference.command_line import add_input, add_limits, model_parser, print_result, run_script, say
from neobert.inference.load import load
from neobert.inference.pseudo_perplexity import ScoreSettings, pseudo_perplexity_to_file, summarize
from neobert.inference.texts import open_texts


def main() -> None:
    parser = model_parser(__doc__)
    add_input(parser)
    add_limits(parser)
    parser.add_argument("--output", required=True, type=Path, help="JSONL file, one line a document")
    parser.add_argument("--chunked", type=int, metavar="K", help="faster estimate: mask every K-th token at once")
    parser.add_argument(
        "--bias-documents", type=int, default=16, help="first documents scored exactly too (default 16)"
    )
    args = parser.parse_args()
    model = load(args.model, device=args.device, dtype=args.dtype, weights=args.weights)
    args.max_length = min(args.max_length or model.max_length, model.max_length)
    settings = ScoreSettings(**{name: getattr(args, name) for name in ScoreSettings.__dataclass_fields__})
    with open_texts(args.input, text_column=args.text_column, split=args.split) as texts:
        pseudo_perplexity_to_file(model, texts, args.output, settings)
        say(*texts.notes, *texts.describe_gaps())
    summary = summarize(args.output)
    print_result(dataclasses.asdict(summary), summary.describe(), as_json=args.json)


if __name__ == "__main__":
    sys.exit(run_script(main))
