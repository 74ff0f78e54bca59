"""Check that an exported folder, loaded with transformers in a fresh process, agrees with our model."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from neobert.export.choose import ExportError
from neobert.export.verify import verify
from neobert.weights.describe import WeightsError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="exported folder")
    parser.add_argument("--against", help="the run or checkpoint it was made from (default: the folder, read by us)")
    parser.add_argument("--weights", default="model", help="with --against: model, or ema for their moving average")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    try:
        (verdict,) = verify([(args.folder, args.against)], kind=args.weights)
    except (ExportError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = {**dataclasses.asdict(verdict), "passed": verdict.passed}
    print(json.dumps(result) if args.json else verdict.describe())
    return 0 if verdict.passed else 1


if __name__ == "__main__":
    sys.exit(main())
