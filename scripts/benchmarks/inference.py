"""Tokens per second of a model, packed, against the same weights in transformers with padded batches.

python scripts/benchmarks/inference.py MODEL INPUT
"""

from itertools import islice

from neobert import cli
from neobert.benchmark.flags import count
from neobert.inference.command_line import add_input, model_parser
from neobert.output import print_result


def main() -> None:
    parser = model_parser(__doc__)
    add_input(parser)
    parser.add_argument("--documents", type=count, default=512, help="texts to use (default %(default)s)")
    parser.add_argument("--batch-tokens", type=count, help="packed (default 8192)")
    parser.add_argument("--rows", type=count, default=32, help="texts of a padded batch (default %(default)s)")
    parser.add_argument("--repeats", type=count, default=5, help="measurements, of which the median counts")
    args = parser.parse_args()
    if args.dtype != "fp32":
        raise ValueError("--dtype: the two are compared in fp32; leave it out")
    import torch

    from neobert.benchmark.inference import compare
    from neobert.inference.load import load
    from neobert.inference.packed import BATCH_TOKENS
    from neobert.inference.texts import open_texts

    with open_texts(args.input, text_column=args.text_column, split=args.split) as opened:
        texts = [text.text for text in islice(opened.read(), args.documents)]
    model = load(args.model, device=args.device)
    batch_tokens = args.batch_tokens or BATCH_TOKENS
    lines = compare(model, texts, batch_tokens=batch_tokens, rows=args.rows, repeats=args.repeats)
    machine = f"{torch.get_num_threads()} threads on {model.module.head_weight.device}"
    print_result("\n".join([*lines, machine]))


if __name__ == "__main__":
    cli.run(main, also=(OSError, ValueError))
