"""Tokenise the data of a config once: `preprocess.py CONFIG [--section.key value ...] [--report] [--debug]`.

--report  measure lengths, unknown tokens and duplicates of what was written
--debug   write nothing; print the first rows of the run as text, with the measured mix of masks
"""

import sys

from neobert.train.preprocess import run_preprocess

if __name__ == "__main__":
    sys.exit(run_preprocess(sys.argv[1:], str(__doc__)))
