"""Flags of several commands, and what they are read with. Nothing here needs torch."""

import argparse
import inspect
import json
import os
from pathlib import Path
from typing import Any, NoReturn

from neobert.cli import print_result
from neobert.errors import CallError

POOLING_HELP = "mean, cls or max (default mean)"
WEIGHTS_HELP = "model, or ema for their moving average (default model)"
_MODEL_HELP = "run folder (its newest checkpoint is used), checkpoint, exported folder, or a name of the hub"


class Parser(argparse.ArgumentParser):
    """A parser whose errors end a command as all others do."""

    def error(self, message: str) -> NoReturn:
        raise CallError(f"{message}\n{self.format_usage().rstrip()}")


def build_parser(program: str, description: str | None, **options: Any) -> Parser:
    """A parser without flags.

    Args:
        program: what was typed before the arguments, for the usage line.
        description: the docstring of the command.
    """
    text, style = inspect.cleandoc(description or ""), argparse.RawDescriptionHelpFormatter
    return Parser(prog=program, description=text, formatter_class=style, **options)


# ---- types: a wrong value is refused before anything is opened or measured ----


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


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction from 0 to 1")
    return value


def seconds(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} must be greater than 0")
    return value


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


def shard(text: str) -> tuple[int, int]:
    """`i/n` with i from 1, as (i - 1, n)."""
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise argparse.ArgumentTypeError(f"{text!r}: write i/n with i from 1 to n, for example 1/8")
    return int(number) - 1, int(total)


# ---- groups of flags ----


def add_json(parser: argparse.ArgumentParser, what: str = "print one JSON object") -> None:
    parser.add_argument("--json", action="store_true", help=what)


def print_answer(data: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Prints what a command was asked for, as one JSON object or as text."""
    print_result(json.dumps(data) if as_json else text)


def build_model_parser(program: str, description: str | None) -> Parser:
    """A parser with the model, where and how to compute."""
    parser = build_parser(program, description)
    parser.add_argument("model", help=_MODEL_HELP)
    parser.add_argument("--device", default="auto", help="auto (a GPU when there is one), cpu or cuda")
    add_dtype(parser)
    parser.add_argument("--weights", default="model", choices=["model", "ema"], help="ema: their moving average")
    return parser


def add_dtype(parser: argparse.ArgumentParser) -> None:
    meaning = "of matrix products (auto: bf16 on a GPU that has it, else fp32)"
    parser.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help=meaning)


def add_input(parser: argparse.ArgumentParser) -> None:
    """An input of texts, and which column and split of it."""
    parser.add_argument("input", help="JSONL, text, CSV or Parquet: a file, folder, pattern or address; - reads stdin")
    add_columns(parser)


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Which column and split of an input."""
    parser.add_argument("--text-column", help="default: text, content, sentence, or the only one with text")
    parser.add_argument("--split", help="where the input has several")


def add_limits(parser: argparse.ArgumentParser) -> None:
    """How much of an input is scored, in what batches, and how the metrics are printed."""
    parser.add_argument(
        "--max-length", type=int, help="longer documents are cut in pieces (default: the model's length)"
    )
    parser.add_argument("--max-documents", type=int, help="default: all")
    parser.add_argument("--batch-tokens", type=int, help="tokens of a batch (default 8192)")
    add_json(parser, "print the metrics as one JSON object")


def build_pairs_parser(program: str, description: str | None, pairs_help: str, prefix_help: str) -> Parser:
    """A parser with a model, a set of pairs, and how its texts are embedded."""
    parser = build_parser(program, description)
    parser.add_argument("model", help=f"{_MODEL_HELP}; of an encoder of others too")
    parser.add_argument("pairs", help=pairs_help)
    parser.add_argument("--split", help="split to read")
    add_vector_settings(parser)
    parser.add_argument("--anchor-prefix", help="put before anchors; default: as the model was trained")
    parser.add_argument("--positive-prefix", help=f"{prefix_help}; default: as the model was trained")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    add_dtype(parser)
    return parser


def add_vector_settings(parser: argparse.ArgumentParser) -> None:
    """How an encoder makes vectors of texts, where it is not to be as it was trained."""
    parser.add_argument("--pooling", help="mean, cls, max or tokens (MaxSim); default: as in its training, else mean")
    parser.add_argument("--max-length", type=int, help="cut texts at so many tokens; default: as in its training")


def build_files_parser(program: str, description: str | None, *, rows: int, repeats: int) -> Parser:
    """Files, a tokenizer, and the shape of a batch."""
    parser = build_parser(program, description)
    parser.add_argument("files", help="text files, as a path or a pattern")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--max-seq-length", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=rows, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--repeats", type=count, default=repeats, help="default: %(default)s")
    return parser


def check_one_process(runs: str) -> None:
    """Raises CallError under a launcher that has started several processes; `runs` is what this command makes."""
    if (size := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
        raise CallError(
            f"WORLD_SIZE: {size} processes; {runs} run one after the other in one process, start it without torchrun"
        )


def build_experiment_parser(
    program: str, description: str | None, *, file_help: str | None = None, name: str | None = None
) -> Parser:
    """The arguments of all experiments; `parse_experiment` reads them. One that takes no file has a name."""
    parser = build_parser(
        program,
        description,
        allow_abbrev=False,
        epilog="After these, settings as for pretrain: --section.key value. They hold for every run.",
    )
    if name is None:
        parser.add_argument("file", type=Path, help=file_help)
    else:
        parser.set_defaults(file=Path(name))
    parser.add_argument("--data", required=True, type=Path, help="folder with files called train* and validation*")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: the one that the config names)")
    parser.add_argument("--output", type=Path, help="folder of the runs (default: outputs/experiments/NAME)")
    parser.add_argument("--threads", type=int, default=2, help="threads that compute (default %(default)s)")
    return parser


def parse_experiment(parser: Parser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and what overrides every config: data, tokenizer, and the user's own settings, which win."""
    options, settings = parser.parse_known_args(argv)
    check_one_process("experiments")
    if options.threads < 1:
        parser.error(f"--threads: {options.threads}; write 1 or more")
    options.output = (options.output or Path("outputs/experiments") / options.file.stem).absolute()
    options.data = options.data.absolute()
    from neobert.benchmark.experiment_plan import use_local

    return options, [*use_local(options.data, options.tokenizer), *settings]
