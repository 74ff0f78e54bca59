"""What a checkpoint costs to save and to load: `python scripts/benchmarks/save_cost.py` (250 million parameters)."""

import sys

from neobert.benchmark.save_cost import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
