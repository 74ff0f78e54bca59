"""Tokens per second and packing fill of the input pipeline, against `datasets.map` with a greedy collator.

python scripts/benchmark/input_pipeline.py FILES --tokenizer FOLDER
"""

import argparse

from neobert.benchmark.input_pipeline import compare
from neobert.config.load import parse_config
from neobert.data.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", help="JSONL files, as a path or a pattern")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder or hub name")
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    parser.add_argument("--batches", type=int, default=2000, help="batches of one measurement")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    settings = [
        f"dataset.path={args.files}",
        f"tokenizer.path={args.tokenizer}",
        f"dataset.max_seq_length={args.max_seq_length}",
        f"model.max_position_embeddings={args.max_seq_length}",
        f"trainer.per_device_train_batch_size={args.rows}",
        "trainer.max_steps=1",
    ]
    config = parse_config("", settings)
    compare(config, load_tokenizer(config.tokenizer), args.files, args.batches, args.repeats)


if __name__ == "__main__":
    main()
