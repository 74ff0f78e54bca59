"""Tokenise a dataset once, into a folder that pretraining then reads by index.

python scripts/pretraining/tokenize_dataset.py --dataset x.jsonl --tokenizer my_tokenizer --output tokenized_data/x
python scripts/pretraining/tokenize_dataset.py --output tokenized_data/x --report

A start after an interruption, with the same flags, goes on where it was and gives the same bytes.
"""

import sys

from neobert.data.tokenize_command import run_tokenize

if __name__ == "__main__":
    sys.exit(run_tokenize(sys.argv[1:], str(__doc__)))
