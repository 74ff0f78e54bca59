"""Continue a run at a longer context, on documents that are long enough for it.

python scripts/pretraining/longer_seq.py run.yaml --checkpoint outputs/run --max-length 4096 --trainer.max_steps 12000
"""

import argparse
from pathlib import Path

from neobert import cli
from neobert.config.command_line import parse_command_line


def main() -> int:
    args, words = build_parser().parse_known_args()
    config = parse_command_line(words, description=str(__doc__))
    from neobert.commands.longer_seq import run_longer

    return run_longer(config, args, words)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s CONFIG.yaml [--section.key VALUE ...] --checkpoint RUN --max-length N [options]",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run folder (its newest) or one checkpoint")
    parser.add_argument(
        "--max-length",
        required=True,
        type=int,
        action="append",
        help="new row length in tokens; given several times, one subset each, and the run takes the longest",
    )
    parser.add_argument("--min-length", type=int, help="tokens of the shortest document kept; default: half the length")
    parser.add_argument("--rope-theta", type=float, help="base of the rotary frequencies; default: as the config says")
    parser.add_argument("--output", type=Path, help="folder of the subsets; default: tokenized_data/<config>-long")
    parser.add_argument("--prepare-only", action="store_true", help="write the subsets and the commands, then stop")
    return parser


if __name__ == "__main__":
    cli.run(main, resumes=True)
