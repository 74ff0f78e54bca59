"""Kill a run at random instants, compare it with one left alone: `python scripts/kill_storm.py FOLDER --kills 200`."""

import sys

from neobert.benchmark.kill_storm import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
