"""Pseudo-perplexity of texts: python scripts/evaluation/pseudo_perplexity.py MODEL INPUT --output scores.jsonl

Every token is masked once, alone. One line of the output for each document; the figure over all of them is printed.
Type the same command again when it was interrupted.
"""

import dataclasses
from pathlib import Path

from neobert import cli
from neobert.inference.command_line import add_input, add_limits, given, model_parser, print_result


def main() -> None:
    parser = model_parser(__doc__)
    add_input(parser)
    add_limits(parser)
    parser.add_argument("--output", required=True, type=Path, help="JSONL file, one line a document")
    parser.add_argument("--chunked", type=int, metavar="K", help="faster estimate: mask every K-th token at once")
    parser.add_argument("--bias-documents", type=int, help="first documents scored exactly too (default 16)")
    args = parser.parse_args()
    from neobert.inference.load import load
    from neobert.inference.pseudo_perplexity import ScoreSettings, pseudo_perplexity_to_file, summarize
    from neobert.inference.texts import open_texts

    model = load(args.model, device=args.device, dtype=args.dtype, weights=args.weights)
    args.max_length = min(args.max_length or model.max_length, model.max_length)
    settings = ScoreSettings(**given(args, ScoreSettings))
    with open_texts(args.input, text_column=args.text_column, split=args.split) as texts:
        pseudo_perplexity_to_file(model, texts, args.output, settings)
        cli.say(*texts.notes, *texts.describe_gaps())
    summary = summarize(args.output)
    print_result(dataclasses.asdict(summary), summary.describe(), as_json=args.json)


if __name__ == "__main__":
    cli.run(main, also=(ValueError,), resumes=True)
