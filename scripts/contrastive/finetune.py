"""Fine-tune an encoder on pairs: `python scripts/contrastive/finetune.py CONFIG [--section.key value ...]`."""

import sys

from neobert import cli
from neobert.config.command_line import parse_command_line


def main() -> int:
    config = parse_command_line(sys.argv[1:], description=str(__doc__))
    from neobert.contrastive.data import NotPrepared
    from neobert.contrastive.finetune import finetune
    from neobert.contrastive.preprocess import preprocess_command
    from neobert.train.exit_codes import EXIT_CODES

    try:
        return EXIT_CODES[finetune(config).reason]
    except NotPrepared as error:
        raise NotPrepared(f"{error}; prepare the sets first:\n  {preprocess_command(sys.argv[1:])}") from error


if __name__ == "__main__":
    cli.run(main)
