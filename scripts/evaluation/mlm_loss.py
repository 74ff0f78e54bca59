"""Masked-token loss of a model on any text: python scripts/evaluation/mlm_loss.py MODEL INPUT

MODEL is a run, a checkpoint, an exported folder, or the name of a masked language model on the hub. The masks are those
of the evaluation in training. With --whole-words, models with different tokenizers can be compared.
"""

import dataclasses

from neobert import cli
from neobert.inference.command_line import add_input, add_limits, given, model_parser, print_result


def main() -> None:
    parser = model_parser(__doc__)
    add_input(parser)
    add_limits(parser)
    parser.add_argument("--mlm-probability", type=float, help="default 0.15")
    parser.add_argument("--mask-all", action="store_true", help="always [MASK], instead of 80%% [MASK] and 10%% random")
    parser.add_argument("--eval-seed", dest="seed", type=int, default=0, help="seed of the masks (default 0)")
    parser.add_argument(
        "--truncate", action="store_true", help="score the first --max-length tokens of a document only"
    )
    parser.add_argument("--min-length", type=int, help="default 5 tokens")
    parser.add_argument("--whole-words", action="store_true", help="mask words, and report bits per byte")
    parser.add_argument("--piece-chars", type=int, help="default 1000")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model of others")
    args = parser.parse_args()
    from neobert.inference.mlm_loss import LossSettings, mlm_loss
    from neobert.inference.scorer import load_scorer
    from neobert.inference.texts import open_texts

    settings = LossSettings(**given(args, LossSettings))
    where = {"device": args.device, "dtype": args.dtype, "weights": args.weights}
    scorer = load_scorer(args.model, **where, trust_remote_code=args.trust_remote_code)
    with open_texts(args.input, text_column=args.text_column, split=args.split) as texts:
        result = mlm_loss(scorer, texts, settings)
        cli.say(*texts.notes, *texts.describe_gaps())
    print_result(dataclasses.asdict(result), result.describe(), as_json=args.json)


if __name__ == "__main__":
    cli.run(main, also=(OSError, ValueError))
