"""What a checkpoint costs to save and to load: `python scripts/benchmarks/save_cost.py` (250 million parameters)."""

import argparse
import tempfile
from pathlib import Path

from neobert import cli
from neobert.benchmark.flags import count
from neobert.output import print_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=count, default=768)
    parser.add_argument("--num-layers", type=count, default=32, help="32 of width 768 are 252 million parameters")
    parser.add_argument("--vocab-size", type=count, default=32768)
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary folder)")
    arguments = parser.parse_args()
    if arguments.folder is not None and not arguments.folder.is_dir():
        parser.error(f"--folder: {arguments.folder} is not a folder; make it first")
    from neobert.benchmark.save_cost import build_config, measure

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        config = build_config(
            Path(folder),
            hidden_size=arguments.hidden_size,
            num_layers=arguments.num_layers,
            vocab_size=arguments.vocab_size,
        )
        print_result(measure(config, arguments.repeats).table())


if __name__ == "__main__":
    cli.run(main)
