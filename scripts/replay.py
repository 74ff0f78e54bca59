"""Print a row of a run by its number: `python scripts/replay.py RUN --row 1234`."""

import argparse
from pathlib import Path

from neobert import cli
from neobert.output import print_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder (its newest checkpoint is used) or checkpoint folder")
    parser.add_argument("--row", type=int, required=True, help="row number, counted from 0 at the start of the run")
    arguments = parser.parse_args()
    from neobert.commands.replay import replay_row

    print_result(replay_row(arguments.run, arguments.row).describe())


if __name__ == "__main__":
    cli.run(main)
