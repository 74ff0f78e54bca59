"""Look after the checkpoints of a run: `python scripts/checkpoint.py verify|list|prune RUN`, `... diff ONE OTHER`."""

import argparse
import time
from pathlib import Path

from neobert import cli


def main() -> int:
    arguments = build_parser().parse_args()
    from neobert.commands.inspect_checkpoints import diff_checkpoints, list_run, prune_run, verify_run

    whole = True
    if arguments.command == "verify":
        lines, whole = verify_run(arguments.run)
    elif arguments.command == "list":
        lines = list_run(arguments.run, time.time())
    elif arguments.command == "prune":
        lines = prune_run(arguments.run, keep=arguments.keep, dry_run=arguments.dry_run)
    else:
        lines = diff_checkpoints(arguments.one, arguments.other)
    print("\n".join(lines))
    return 0 if whole else 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Look after the checkpoints of a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("verify", "read every file and compare its sha256; exit code 1 when one is damaged"),
        ("list", "step, size, age, evaluation loss"),
        ("prune", "delete what the run's retention settings do not keep"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("run", type=Path, help="run folder")
    command.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    command.add_argument("--keep", type=int, help="keep this many instead of trainer.save_total_limit")
    command = commands.add_parser("diff", help="what differs between two checkpoints or two runs")
    command.add_argument("one", type=Path)
    command.add_argument("other", type=Path)
    return parser


if __name__ == "__main__":
    cli.run(main)
