"""What the scripts that use a model have in common: their first arguments, and how they fail."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from neobert.config.secrets import scrub
from neobert.inference.load import DTYPES
from neobert.inference.packed import BATCH_TOKENS
from neobert.weights.load import WEIGHTS

MODEL_HELP = "run folder (its newest checkpoint is used), checkpoint, exported folder, or a name of the hub"


def model_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the model, where and how to compute."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--device", default="auto", help="auto (a GPU when there is one), cpu or cuda")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="of matrix products (default fp32)")
    add_weights(parser)
    return parser


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Which weights of a checkpoint are used."""
    parser.add_argument("--weights", default="model", choices=list(WEIGHTS), help="ema: their moving average")


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
    parser.add_argument(
        "--batch-tokens", type=int, default=BATCH_TOKENS, help="tokens of a batch (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


def run_script(main: Callable[[], None]) -> int:
    """Runs a script; what the user can mend becomes one sentence and exit code 2."""
    try:
        main()
    except OSError as error:
        where = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error
        print(f"error: {scrub(str(where))}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {scrub(str(error))}", file=sys.stderr)
        return 2
    return 0


def say(*lines: str) -> None:
    """Prints to the error output: results alone go to the standard output."""
    print(*map(scrub, lines), sep="\n", file=sys.stderr)


def print_result(result: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Prints a result as one JSON object, or as text."""
    print(json.dumps(result) if as_json else text)
