"""Fill the masks of a text with a trained model."""

import argparse
import dataclasses
import json
import sys

from neobert.inference.fill_mask import fill_mask
from neobert.inference.load import load_masked_lm
from neobert.weights.manifest import CheckpointError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="run folder (its newest checkpoint is used) or checkpoint folder")
    parser.add_argument("text", nargs="+", help='text with [MASK], for example "The capital of France is [MASK]."')
    parser.add_argument("--top-k", type=int, default=5, help="tokens to show for each mask (default 5)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a text")
    arguments = parser.parse_args()
    try:
        model, tokenizer = load_masked_lm(arguments.model, device=arguments.device)
        results = fill_mask(model, tokenizer, arguments.text, top_k=arguments.top_k)
    except (FileNotFoundError, ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for result in results:
        print(json.dumps(dataclasses.asdict(result)) if arguments.json else result.describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
