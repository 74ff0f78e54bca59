"""Run a list of stages, each from what the one before it made: python scripts/pipeline.py FILE [overrides]

Finished stages are skipped, one that was interrupted goes on. Overrides are laid over every stage with a config.
"""

import argparse
import sys
from pathlib import Path

from neobert import cli
from neobert.commands.staged_run import load_pipeline, run_pipeline


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("file", type=Path, help="YAML with output and stages")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    args, overrides = parser.parse_known_args()
    return run_pipeline(load_pipeline(args.file, overrides), Path(sys.argv[0]).parent, dry_run=args.dry_run)


if __name__ == "__main__":
    cli.run(main)
