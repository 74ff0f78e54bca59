"""Commands about runs of many processes. Libraries are imported after the arguments are read."""

from pathlib import Path

from neobert import cli
from neobert.commands.flags import add_json, build_parser, count, print_answer


def benchmark_ranks(program: str, argv: list[str]) -> None:
    """What the data of a run costs each of many ranks: start, memory, state, and whether every row is read once.

    neobert benchmark-ranks FOLDER --ranks 512 --shards 100000

    Ranks are simulated one after the other, without a model. Tiny files are written to the folder, and kept.
    """
    parser = build_parser(program, benchmark_ranks.__doc__)
    parser.add_argument("folder", type=Path, help="where the files are written, or are from an earlier call")
    parser.add_argument("--ranks", type=count, default=24, help="default: %(default)s")
    parser.add_argument("--shards", type=count, default=500, help="files; default: %(default)s")
    add_json(parser)
    args = parser.parse_args(argv)
    from dataclasses import asdict

    from neobert.benchmark.simulated_ranks import simulate

    found = simulate(args.folder.absolute(), ranks=args.ranks, shards=args.shards, say=cli.say)
    print_answer(asdict(found), found.describe(), as_json=args.json)
