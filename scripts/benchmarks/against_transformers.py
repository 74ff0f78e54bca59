"""Our training step against a plain loop on transformers and against our own reference paths, on real text (CPU).

python scripts/benchmarks/against_transformers.py TEXT.jsonl --tokenizer FOLDER
"""

import argparse
import dataclasses

from neobert import cli
from neobert.benchmark.flags import count, count_or_zero
from neobert.benchmark.settings import CONTESTANTS, PRESETS, AgainstSettings
from neobert.output import print_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="JSONL file (or .gz) with a field `text`")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--rounds", type=count, default=3, help="turns of each, of which the median counts")
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    for field in dataclasses.fields(AgainstSettings)[2:]:
        kind = {"length": count, "rows": count, "steps": count, "warmup": count_or_zero}.get(field.name, str)
        choices = {"preset": list(PRESETS), "precision": ["bf16", "fp32"]}.get(field.name)
        parser.add_argument(
            f"--{field.name}", type=kind, choices=choices, default=field.default, help="default: %(default)s"
        )
    values = vars(parser.parse_args())
    rounds, names = values.pop("rounds"), values.pop("only")
    from neobert.benchmark.against import compare

    print_result(compare(AgainstSettings(**values), names, rounds))


if __name__ == "__main__":
    cli.run(main, also=(ValueError,))
