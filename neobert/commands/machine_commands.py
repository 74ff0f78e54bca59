"""Commands that ask what this machine makes of the code."""

from pathlib import Path

from neobert import cli
from neobert.commands.flags import build_parser, count


def gpu_check(program: str, argv: list[str]) -> int:
    """Everything that has to be seen on a GPU once: kernels, speed, memory, exactness, whole runs.

    neobert gpu-check --minutes 9 --output outputs/gpu-check

    Writes gpu-check.json and gpu-check.md (what was expected beside what came out) into the folder as soon as each
    check ends. The same command again skips what is done and tries the rest. Without a GPU it is a dry run on the CPU.
    Exit code 1 when a check failed.
    """
    parser = build_parser(program, gpu_check.__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="of this start (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu-check"), help="default: %(default)s")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes: {args.minutes}; write a number above 0")
    from neobert.benchmark.gpu.gpu_check import TABLE, run_checks

    passed = run_checks(args.output, minutes=args.minutes, say=cli.print_result)
    cli.say(f"{args.output / TABLE} has the table")
    return 0 if passed else 1


def benchmark_busy(program: str, argv: list[str]) -> None:
    """The training step beside programs that want the same CPUs, by how threads wait: `neobert benchmark-busy`.

    Takes four minutes, and starts up to four processes that keep the CPUs busy meanwhile.
    """
    parser = build_parser(program, benchmark_busy.__doc__)
    parser.add_argument("--loads", type=int, nargs="+", default=[1, 2, 4], help="competing processes, beside none")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--repeats", type=count, default=3)
    args = parser.parse_args(argv)
    if min(args.loads) < 0:
        parser.error(f"--loads: {min(args.loads)} is no number of processes; write 0 or more")
    if not args.seconds > 0:
        parser.error(f"--seconds: {args.seconds} must be greater than 0")
    from neobert.benchmark.busy_cpu import BusySettings, describe, measure_ways

    settings = BusySettings(loads=tuple(sorted({0, *args.loads})), seconds=args.seconds, repeats=args.repeats)
    cli.print_result(describe(settings, measure_ways(settings)))
