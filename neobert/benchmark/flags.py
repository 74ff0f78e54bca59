"""Types of flags that the command lines of benchmarks share: a wrong value is refused by the parser, before anything is
measured."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


def count(text: str) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number of at least 1")
    return int(text)


def count_or_zero(text: str) -> int:
    """A number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: write a number of at least 0")
    return int(text)


def device(text: str) -> str:
    """The name of a device that this machine has."""
    import torch  # Only where a device is asked about, which `--help` does not.

    try:
        kind = torch.device(text).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; write cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text} is not here (torch sees no GPU); write cpu")
    return text


class Arguments(NamedTuple):
    """The command line of an experiment."""

    options: argparse.Namespace
    overrides: list[str]
    """What lies over every config: data, tokenizer, and the user's own settings, which win."""


def build_parser(description: str | None, *, file_help: str) -> argparse.ArgumentParser:
    """The arguments that experiments share; `parse_arguments` reads them."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Behind these, settings as for pretrain.py: --section.key value. They hold for every run.",
    )
    parser.add_argument("file", type=Path, help=file_help)
    parser.add_argument("--data", required=True, type=Path, help="folder with files called train* and validation*")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: the one that the config names)")
    parser.add_argument("--output", type=Path, help="folder of the runs (default: outputs/experiments/NAME)")
    parser.add_argument("--threads", type=int, default=2, help="threads that compute (default %(default)s)")
    return parser


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> Arguments:
    """Options, and settings in the spellings of every training script."""
    options, settings = parser.parse_known_args(argv)
    if options.threads < 1:
        parser.error(f"--threads: {options.threads}; write 1 or more")
    options.output = (options.output or Path("outputs/experiments") / options.file.stem).absolute()
    options.data = options.data.absolute()
    overrides = [f"dataset.path={options.data}"]
    if options.tokenizer is not None:
        overrides += ["tokenizer.name=null", f"tokenizer.path={options.tokenizer.absolute()}"]
    return Arguments(options, [*overrides, *settings])
