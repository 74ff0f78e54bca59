"""Average the last checkpoints of a run: python scripts/average_checkpoints.py RUN --last 5 --output FOLDER

The folder loads like a checkpoint: predict, embed, export, model.init_from.
"""

import argparse
from pathlib import Path

from neobert import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--last", type=int, help="average the newest so many checkpoints (default 5)")
    parser.add_argument("--steps", type=int, nargs="+", help="average these steps instead")
    parser.add_argument("--shares", type=float, nargs="+", help="weight of each, in the order of the steps")
    parser.add_argument("--weights", default="model", help="model, or ema for their moving averages (default model)")
    args = parser.parse_args()
    from neobert.commands.average_checkpoints import AverageRequest, average_checkpoints

    request = AverageRequest(
        run=args.run,
        output=args.output,
        last=args.last,
        steps=None if args.steps is None else tuple(args.steps),
        shares=None if args.shares is None else tuple(args.shares),
        weights=args.weights,
    )
    print(f"{request.output}/: {average_checkpoints(request).describe()}")


if __name__ == "__main__":
    cli.run(main)
