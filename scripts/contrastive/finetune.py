"""Fine-tune an encoder on pairs: `python scripts/contrastive/finetune.py CONFIG [--section.key value ...]`."""

import sys

from neobert.contrastive.finetune import run_finetune

if __name__ == "__main__":
    sys.exit(run_finetune(sys.argv[1:], str(__doc__)))
