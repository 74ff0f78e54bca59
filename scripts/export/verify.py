"""Check that an exported folder, loaded with transformers in a fresh process, agrees with our model."""

import argparse
import dataclasses
import json
from pathlib import Path

from neobert import cli


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="exported folder")
    parser.add_argument("--against", help="the run or checkpoint it was made from (default: the folder, read by us)")
    parser.add_argument("--weights", default="model", help="with --against: model, or ema for their moving average")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    from neobert.export.verify import verify

    (verdict,) = verify([(args.folder, args.against)], kind=args.weights)
    result = {**dataclasses.asdict(verdict), "passed": verdict.passed}
    print(json.dumps(result) if args.json else verdict.describe())
    return 0 if verdict.passed else 1


if __name__ == "__main__":
    cli.run(main)
