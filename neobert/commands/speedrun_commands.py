"""`neobert speedrun`: set, verify and list records. Libraries are imported after the arguments are read."""

import argparse
from pathlib import Path

from neobert import cli
from neobert.commands.flags import Parser, build_parser, check_one_process, count
from neobert.errors import CallError

_HOME = "the folder speedrun of a clone (default: %(default)s)"


def speedrun(program: str, argv: list[str]) -> int:
    """Records of masked language modelling, with seeds and p-values; speedrun/README.md has the rules.

    neobert speedrun run cpu-417s CONFIG --data FOLDER --output speedrun/records/NAME
    neobert speedrun verify speedrun/records/NAME --data FOLDER
    neobert speedrun table
    neobert speedrun data stdlib-417s --output FOLDER
    """
    parser = build_parser(program, speedrun.__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    _add_run(actions.add_parser("run", help="train the seeds of a record and write it", allow_abbrev=False))
    _add_verify(actions.add_parser("verify", help="make seeds of a record again; exit code 1 for `not`"))
    actions.add_parser("table", help="print the table of records, write it and the picture")
    _add_data(actions.add_parser("data", help="build the data of a track"))
    for action in actions.choices.values():
        action.add_argument("--home", type=Path, default=Path("speedrun"), help=_HOME)
    args, settings = parser.parse_known_args(argv)
    if settings and args.action != "run":
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    _check_home(args.home)
    check_one_process("seeds")
    return {"run": _run, "verify": _verify, "table": _table, "data": _data}[args.action](args, settings)


def _add_run(parser: Parser) -> None:
    parser.epilog = "After these, settings as for pretrain: --section.key value."
    parser.add_argument("track", help="a track of speedrun/README.md")
    parser.add_argument("config", type=Path, help="config of the runs; data, tokenizer and seeds are the track's")
    parser.add_argument("--data", required=True, type=Path, help="folder with the data of the track")
    parser.add_argument("--output", required=True, type=Path, help="folder of the record")
    parser.add_argument("--seeds", type=_seeds, default=(0, 1, 2), help="separated by commas (default: 0,1,2)")
    parser.add_argument("--tokenizer", type=Path, help="a folder with the tokenizer of the track")
    parser.add_argument("--threads", type=count, help="that compute (default: those of the track, else 2)")
    parser.add_argument("--steps", type=count, help="of each seed (default: as many as the limit allows)")
    parser.add_argument("--speed-steps", type=count, default=50, help="of the run that measures the speed (default 50)")
    parser.add_argument("--title", help="default: the name of the record's folder")
    parser.add_argument("--idea", help="one sentence (default: the first line of the config, a comment)")
    parser.add_argument("--work", type=Path, help="folder of the runs (default: outputs/speedrun/NAME)")


def _add_verify(parser: Parser) -> None:
    parser.add_argument("record", type=Path, help="folder of the record")
    parser.add_argument("--data", required=True, type=Path, help="folder with the data of the track")
    parser.add_argument("--tokenizer", type=Path, help="a folder with the tokenizer of the track")
    parser.add_argument("--seed", type=int, action="append", default=[], help="may be repeated (default: the first)")


def _add_data(parser: Parser) -> None:
    parser.add_argument("track", help="a track of speedrun/README.md")
    parser.add_argument("--output", required=True, type=Path, help="a new folder")
    parser.add_argument("--source", type=Path, help="stdlib-417s: the folder Lib of the pinned CPython's sources")


def _seeds(text: str) -> tuple[int, ...]:
    """`0,1,2`, each once."""
    parts = text.split(",")
    seeds = tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else ()
    if len({*seeds}) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r}: write different numbers, separated by commas, such as 0,1,2")
    return seeds


def _check_home(home: Path) -> None:
    if not (home / "data").is_dir():
        raise CallError(
            f"--home: {home}/data is not there; records and manifests are part of the repository, not of the installed "
            "package: call this in a clone, or name its folder speedrun with --home"
        )


def _run(args: argparse.Namespace, settings: list[str]) -> int:
    from neobert.benchmark.speedrun_tracks import build_config, choose_track

    track = choose_track(args.track)
    # What is wrong is said before torch is imported, and a seed that is too large before another one is trained.
    build_config(track, args.config, settings, args.data, seed=max(args.seeds))
    from neobert.benchmark.speedrun_records import RECORD

    idea = args.idea or (None if (args.output / RECORD).is_file() else _read_idea(args.config))
    from neobert.benchmark.speedrun import RecordRequest, make_record

    request = RecordRequest(
        track=track,
        config=args.config,
        settings=tuple(settings),
        seeds=args.seeds,
        data=args.data,
        tokenizer=args.tokenizer,
        output=args.output,
        work=(args.work or Path("outputs/speedrun") / args.output.absolute().name).absolute(),
        home=args.home,
        title=args.title,
        idea=idea,
        threads=args.threads or track.threads or 2,
        num_steps=args.steps,
        speed_steps=args.speed_steps,
    )
    record = make_record(request)
    summary = record.summarize()
    spread = "" if summary["std"] is None else f", std {summary['std']:.4f}"
    result = f"{args.output}: held-out loss {summary['mean']:.4f}{spread}, n = {len(record.runs)}"
    if record.excess:
        cli.print_result(f"{result}; no record: the slowest seed took {record.excess:.1f} s more than {track.limit}")
        return 1
    cli.print_result(f"{result}; neobert speedrun table compares it with the one before")
    return 0


def _read_idea(config: Path) -> str:
    from neobert.config.source import read_yaml_text

    first = read_yaml_text(config, "the config file").partition("\n")[0]
    if not first.startswith("#") or not first.strip("# "):
        raise CallError(f"--idea: say in one sentence what is new, here or in a comment in the first line of {config}")
    return first.strip("# ")


def _verify(args: argparse.Namespace, settings: list[str]) -> int:
    from neobert.benchmark.speedrun_replay import verify_record

    verdicts = []
    for replayed in verify_record(args.record, args.data, args.home, tokenizer=args.tokenizer, seeds=args.seed):
        cli.print_result("\n  ".join(replayed.lines) + f"\n{replayed.verdict}")
        verdicts.append(replayed.verdict)
    return int("not" in verdicts)


def _table(args: argparse.Namespace, settings: list[str]) -> int:
    from neobert.benchmark.speedrun_table import write_table

    cli.print_result(write_table(args.home))
    return 0


def _data(args: argparse.Namespace, settings: list[str]) -> int:
    from neobert.benchmark.speedrun_tracks import choose_track

    track = choose_track(args.track)
    from neobert.benchmark.speedrun_data import build_data

    cli.print_result("\n".join(build_data(track, args.output, args.home, source=args.source)))
    return 0
