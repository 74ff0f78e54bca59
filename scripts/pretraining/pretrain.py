"""Pretrain an encoder: `python scripts/pretraining/pretrain.py CONFIG [--section.key value ...]`."""

import sys

from neobert.config.command_line import parse_command_line
from neobert.config.secrets import scrub
from neobert.data.errors import DataError
from neobert.train.audit import ReplayDiverged
from neobert.train.exit_codes import EXIT_CODES
from neobert.train.loop import pretrain
from neobert.train.runtime import StartupError


def main() -> int:
    config = parse_command_line(sys.argv[1:], description=__doc__)
    try:
        result = pretrain(config)
    except (StartupError, DataError, ReplayDiverged) as error:
        print(f"error: {scrub(str(error))}", file=sys.stderr)
        return 2
    return EXIT_CODES[result.reason]


if __name__ == "__main__":
    sys.exit(main())
