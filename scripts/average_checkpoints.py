"""Average the last checkpoints of a run: python scripts/average_checkpoints.py RUN --last 5 --output FOLDER

The folder loads like a checkpoint: predict, embed, export, model.init_from.
"""

import sys

from neobert.train.averaging import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], str(__doc__)))
