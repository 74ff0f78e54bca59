"""What the scripts that use a model have in common: their first arguments and how they print. Read without torch."""

import argparse
import json
from typing import Any

from neobert import output

MODEL_HELP = "run folder (its newest checkpoint is used), checkpoint, exported folder, or a name of the hub"
POOLING_HELP = "mean, cls or max (default mean)"


def model_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the model, where and how to compute."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--device", default="auto", help="auto (a GPU when there is one), cpu or cuda")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of matrix products (default fp32)")
    add_weights(parser)
    return parser


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Which weights of a checkpoint are used."""
    parser.add_argument("--weights", default="model", choices=["model", "ema"], help="ema: their moving average")


def add_input(parser: argparse.ArgumentParser) -> None:
    """An input of texts, and which column and split of it."""
    parser.add_argument("input", help="JSONL, text, CSV or Parquet: a file, folder, pattern or address; - reads stdin")
    parser.add_argument("--text-column", help="default: text, content, sentence, or the only one with text")
    parser.add_argument("--split", help="where the input has several")


def add_limits(parser: argparse.ArgumentParser) -> None:
    """How much of an input is scored, in what batches, and how the figures are printed."""
    parser.add_argument(
        "--max-length", type=int, help="longer documents are cut in pieces (default: the model's length)"
    )
    parser.add_argument("--max-documents", type=int, help="default: all")
    parser.add_argument("--batch-tokens", type=int, help="tokens of a batch (default 8192)")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


def given(args: argparse.Namespace, settings: type) -> dict[str, Any]:
    """Fields of a settings class whose flags were given; the class has the defaults of the others."""
    names = settings.__dataclass_fields__  # type: ignore[attr-defined]
    return {name: value for name, value in vars(args).items() if name in names and value is not None}


def print_result(result: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Prints a result as one JSON object, or as text."""
    output.print_result(json.dumps(result) if as_json else text)
