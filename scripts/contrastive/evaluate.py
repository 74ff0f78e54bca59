"""Evaluate embeddings of any model on any set of pairs: nDCG@10 and MRR, or Spearman where the pairs have scores.

python scripts/contrastive/evaluate.py outputs/run my_pairs.jsonl
"""

import sys

from neobert.contrastive.evaluate import run_evaluate

if __name__ == "__main__":
    sys.exit(run_evaluate(sys.argv[1:], str(__doc__)))
