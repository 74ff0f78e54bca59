"""Export a trained encoder to a folder for transformers, sentence-transformers and the hub."""

import argparse
import sys
from pathlib import Path

from neobert.config.load import ConfigError
from neobert.export.choose import ExportError
from neobert.export.write import ExportRequest, export


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", metavar="model", help="run folder (its newest checkpoint), checkpoint, or hub name")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--format", dest="form", default="auto", help="auto, native or remote_code (default auto)")
    parser.add_argument("--dtype", default="fp32", help="fp32 or bf16 (default fp32)")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder to this repository")
    parser.add_argument("--drop-decoder-bias", action="store_true", help="leave out a bias of the projection")
    parser.add_argument("--weights", default="model", help="model, or ema for their moving average (default model)")
    parser.add_argument(
        "--language",
        default=(),
        type=lambda codes: tuple(codes.split(",")),
        metavar="CODES",
        help="language of the text it was trained on, for the model card: en, or en,de",
    )
    request = ExportRequest(**vars(parser.parse_args()))
    try:
        done = export(request)
    except (ExportError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*done.notes, sep="\n")
    step = "" if done.step is None else f", step {done.step:,}"
    print(f"{done.folder}/: {done.form}{step}; largest difference of a logit to ours {done.max_logit_error:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
