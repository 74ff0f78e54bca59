"""Print a row of a run by its number: `python scripts/replay.py RUN --row 1234`."""

import argparse
import sys
from pathlib import Path

from neobert.data.errors import DataError
from neobert.train.replay import replay_row
from neobert.train.runtime import StartupError
from neobert.weights.manifest import CheckpointError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder (its newest checkpoint is used) or checkpoint folder")
    parser.add_argument("--row", type=int, required=True, help="row number, counted from 0 at the start of the run")
    arguments = parser.parse_args()
    try:
        print(replay_row(arguments.run, arguments.row).describe())
    except (StartupError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
