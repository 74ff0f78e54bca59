"""How much a config learns in seven minutes of training: python scripts/experiments/yardstick.py CONFIG --data FOLDER

Prints one JSON line with the held-out loss (nats per masked token), the steps, tokens and seconds of training. The
speed is measured first, on a throw-away run, to know how many steps fit.
"""

import sys

from neobert.benchmark.yardstick import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__))
