"""Train the runs of a plan one by one and compare them: python scripts/experiments/compare.py PLAN --data FOLDER

Prints a table; it, results.json and the picture results.svg lie beside the runs. Type the same command again after an
interruption: finished runs are not made again, one that was killed goes on.
"""

import sys

from neobert.benchmark.experiments import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__))
