"""Pretrain an encoder: `python scripts/pretraining/pretrain.py CONFIG [--section.key value ...]`."""

import sys

from neobert import cli
from neobert.config.command_line import parse_command_line


def main() -> int:
    config = parse_command_line(sys.argv[1:], description=__doc__)
    from neobert.cli import EXIT_CODES
    from neobert.train.loop import pretrain

    return EXIT_CODES[pretrain(config).reason]


if __name__ == "__main__":
    cli.run(main)
