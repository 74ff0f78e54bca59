"""Embed texts with a trained model: python scripts/embed.py MODEL INPUT --output vectors.npy

Type the same command again when it was interrupted: it goes on, and the file is the one of an undisturbed run.
"""

import sys
from pathlib import Path

from neobert.inference.command_line import add_input, model_parser, run_script, say
from neobert.inference.embed import EmbedSettings, check_output, embed_to_file
from neobert.inference.load import load
from neobert.inference.pooling import POOLING
from neobert.inference.texts import open_texts


def main() -> None:
    parser = model_parser(__doc__)
    add_input(parser)
    parser.add_argument("--output", required=True, type=Path, help="file ending in .npy or .parquet")
    parser.add_argument("--pooling", default="mean", help=f"{', '.join(POOLING)} (default mean)")
    parser.add_argument("--normalize", action="store_true", help="scale every vector to length 1")
    parser.add_argument("--batch-tokens", type=int, default=EmbedSettings().batch_tokens, help="default %(default)s")
    parser.add_argument("--chunk-texts", type=int, default=EmbedSettings().chunk_texts, help="default %(default)s")
    args = parser.parse_args()
    settings = EmbedSettings(**{name: getattr(args, name) for name in EmbedSettings.__dataclass_fields__})
    check_output(args.output)
    with open_texts(args.input, text_column=args.text_column, split=args.split) as texts:
        model = load(args.model, device=args.device, dtype=args.dtype, weights=args.weights)
        report = embed_to_file(model, texts, args.output, settings)
        say(*texts.notes, *texts.describe_gaps(f"rows of {'zeros' if args.output.suffix == '.npy' else 'nulls'}"))
    resumed = f" ({report.num_resumed:,} of them before the interruption)" if report.num_resumed else ""
    cut = f"; {report.num_truncated:,} were longer than the model and were cut" if report.num_truncated else ""
    say(f"{report.num_texts:,} texts of {report.num_records:,} records{resumed} embedded to {args.output}{cut}")


if __name__ == "__main__":
    sys.exit(run_script(main))
