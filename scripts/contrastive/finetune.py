"""Fine-tune an encoder on pairs: `python scripts/contrastive/finetune.py CONFIG [--section.key value ...]`."""

import sys

from neobert import cli
from neobert.config.command_line import parse_command_line


def main() -> int:
    config = parse_command_line(sys.argv[1:], description=str(__doc__))
    from neobert.cli import EXIT_CODES
    from neobert.contrastive.finetune import finetune
    from neobert.contrastive.pair_data import NotPrepared
    from neobert.contrastive.prepare_sets import preprocess_command

    try:
        return EXIT_CODES[finetune(config).reason]
    except NotPrepared as error:
        raise NotPrepared(f"{error}; prepare the sets first:\n  {preprocess_command(sys.argv[1:])}") from error


if __name__ == "__main__":
    cli.run(main)
