"""Train a tokenizer on any text source and save it to a folder.

python scripts/pretraining/train_tokenizer.py --input my_text/ --output my_tokenizer --vocab-size 32768
python scripts/pretraining/train_tokenizer.py --input python_stdlib --output my_tokenizer --algorithm wordpiece
"""

import argparse
from pathlib import Path

from neobert import cli
from neobert.config.schema_data import DatasetSection
from neobert.errors import DataError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="file, folder, glob, hub data set, or python_stdlib")
    parser.add_argument("--output", required=True, type=Path, help="folder to save to")
    parser.add_argument("--algorithm", choices=["byte_bpe", "wordpiece"], default="byte_bpe")
    parser.add_argument("--vocab-size", type=int, help="default: 32768")
    parser.add_argument("--text-column", help="default: text, content, sentence, or the only one with text")
    parser.add_argument("--documents", type=int, help="read only the first documents, this many")
    args = parser.parse_args()
    if args.output.exists() and not args.output.is_dir():
        raise DataError(f"--output: {args.output} is not a folder; choose another name")
    if (args.output / "tokenizer.json").exists():
        raise DataError(f"--output: {args.output} holds a tokenizer already; choose another folder, or remove that one")
    from neobert.data.source.spec import describe_source
    from neobert.data.store.opening import open_training_texts
    from neobert.data.tokenizer import train_tokenizer

    source = describe_source(args.input, text_column=args.text_column)
    training = open_training_texts([source], DatasetSection(), args.documents)
    tokenizer = train_tokenizer(training.texts, args.algorithm, args.vocab_size)
    tokenizer.save(args.output)
    print(f"{tokenizer.size:,} tokens ({tokenizer.model_name}) saved to {args.output}/; use it as tokenizer.path")


if __name__ == "__main__":
    cli.run(main)
