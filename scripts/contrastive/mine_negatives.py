"""Find hard negatives for pairs with an encoder, and write pairs with negatives as JSON lines.

python scripts/contrastive/mine_negatives.py outputs/run my_pairs.jsonl --output my_triplets.jsonl --num-negatives 5
"""

import sys

from neobert.contrastive.mine import run_mine

if __name__ == "__main__":
    sys.exit(run_mine(sys.argv[1:], str(__doc__)))
