"""Seconds to the first batch of a resumed run at 1%, 50% and 99% of an epoch, streamed and indexed.

python scripts/benchmark/resume_cost.py FILES --tokenizer FOLDER
"""

import argparse

from neobert.benchmark.resume_cost import measure
from neobert.config.load import parse_config
from neobert.data.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", help="text files, as a path or a pattern")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--repeats", type=int, default=5)
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
    measure(config, load_tokenizer(config.tokenizer), (0.01, 0.5, 0.99), args.repeats)


if __name__ == "__main__":
    main()
