"""Kill a run at random instants, compare it with one left alone: `python scripts/kill_storm.py FOLDER --kills 200`."""

import sys

from neobert import cli
from neobert.benchmark.kill_storm import main

if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
