"""Prepare the sets of a contrastive config: `preprocess.py CONFIG [--section.key value ...]`.

`dataset.name` (or `contrastive.sets`) says which: a known set, a dataset of the hub, a local file or folder, or ALL.
"""

import sys

from neobert.contrastive.preprocess import run_preprocess

if __name__ == "__main__":
    sys.exit(run_preprocess(sys.argv[1:], str(__doc__)))
