"""`neobert report`: the page of a run, or of several beside each other."""

from pathlib import Path

from neobert.cli import print_result
from neobert.commands.flags import build_parser
from neobert.errors import CallError


def report(program: str, argv: list[str]) -> None:
    """One HTML page about runs: curves, incidents, settings. It needs no network and no server.

    neobert report outputs/quickstart
    neobert report outputs/one outputs/another --output comparison.html

    A run writes its own page to RUN/report/index.html at every evaluation and at its end.
    """
    parser = build_parser(program, report.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.html",
        help="default: RUN/report/index.html of one run, report/comparison.html in the first of several",
    )
    args = parser.parse_args(argv)
    if args.output is not None and (args.output.suffix not in (".html", ".htm") or args.output.is_dir()):
        raise CallError(f"--output: {args.output}; write the name of a file that ends with .html")
    from neobert.train.report.page import RunReport, check_runs, write_report

    check_runs(args.runs)
    reports = [RunReport(folder) for folder in dict.fromkeys(args.runs)]
    own = reports[0].path
    path = args.output or (own if len(reports) == 1 else own.with_name("comparison.html"))
    try:
        write_report(reports, path)
    except OSError as error:
        raise CallError(
            f"{error.filename or path}: {error.strerror}; --output FILE.html chooses another file"
        ) from error
    print_result(str(path))
