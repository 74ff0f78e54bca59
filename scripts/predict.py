"""Fill the masks of texts with a trained model: python scripts/predict.py MODEL "The capital of France is [MASK]."

A model of replaced-token detection says instead which tokens of a text do not belong.
"""

import dataclasses
import sys
from pathlib import Path

from neobert import cli
from neobert.inference.command_line import model_parser, print_result


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("text", nargs="*", help='text with [MASK], for example "The capital of France is [MASK]."')
    parser.add_argument("--file", help="read texts from a file, one a line; - reads the standard input")
    parser.add_argument("--top-k", type=int, default=5, help="tokens to show for each mask (default 5)")
    parser.add_argument("--joint", action="store_true", help="fill the masks of a text from left to right")
    parser.add_argument("--json", action="store_true", help="print one JSON object a text")
    args = parser.parse_args()
    texts = list(args.text)
    if args.file:
        read = sys.stdin.read() if args.file == "-" else Path(args.file).read_text(encoding="utf-8")
        texts += [line for line in read.splitlines() if line.strip()]
    if not texts:
        raise ValueError('no text is given; write one with [MASK] in it, for example "The sky is [MASK].", or --file')
    from neobert.inference.load import load

    model = load(args.model, device=args.device, dtype=args.dtype, weights=args.weights)
    for result in model.predict(texts, top_k=args.top_k, joint=args.joint):
        print_result(dataclasses.asdict(result), result.describe(), as_json=args.json)


if __name__ == "__main__":
    cli.run(main, also=(OSError, ValueError))
