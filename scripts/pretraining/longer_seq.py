"""Continue a run at a longer context, on documents that are long enough for it.

python scripts/pretraining/longer_seq.py run.yaml --checkpoint outputs/run --max-length 4096 --trainer.max_steps 12000
"""

import sys

from neobert.train.longer import run_longer

if __name__ == "__main__":
    sys.exit(run_longer(sys.argv[1:], str(__doc__)))
