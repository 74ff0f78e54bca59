"""The command line that the benchmarks of the data share."""

import argparse
from typing import TYPE_CHECKING

from neobert.benchmark.flags import count
from neobert.config.load import parse_config
from neobert.config.schema import Config

if TYPE_CHECKING:
    from neobert.data.tokenizer import Tokenizer


def build_data_parser(description: str | None, *, rows: int, repeats: int) -> argparse.ArgumentParser:
    """Files, a tokenizer, and the shape of a batch."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", help="text files, as a path or a pattern")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--max-seq-length", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=rows, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--repeats", type=count, default=repeats, help="default: %(default)s")
    return parser


def read_data_config(args: argparse.Namespace) -> tuple[Config, "Tokenizer"]:
    """The config that these arguments describe, and its tokenizer."""
    config = parse_config(
        "",
        [
            f"dataset.path={args.files}",
            f"tokenizer.path={args.tokenizer}",
            f"dataset.max_seq_length={args.max_seq_length}",
            f"model.max_position_embeddings={args.max_seq_length}",
            f"trainer.per_device_train_batch_size={args.rows}",
            "trainer.max_steps=1",
        ],
    )
    from neobert.data.tokenizer import load_tokenizer  # After the arguments.

    return config, load_tokenizer(config.tokenizer)
