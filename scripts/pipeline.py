"""Run a list of stages, each from what the one before it made: python scripts/pipeline.py FILE [overrides]

Finished stages are skipped, one that was interrupted goes on. Overrides are laid over every stage with a config.
"""

import sys
from pathlib import Path

from neobert.train.pipeline import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(sys.argv[0]).parent, str(__doc__)))
