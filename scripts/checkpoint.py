"""Look after the checkpoints of a run: `python scripts/checkpoint.py verify|list|prune RUN`, `... diff ONE OTHER`."""

import sys

from neobert.train.inspection import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
