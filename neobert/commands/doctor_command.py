"""The command that says what this machine can do."""

from neobert import cli
from neobert.commands.flags import build_parser, print_answer

AUTOMATIC = (
    "--trainer.mixed_precision=auto",
    "--trainer.per_device_train_batch_size=auto",
    "--trainer.global_batch_size=64",
)
"""Laid over the quickstart where no config is named, so that all that `auto` chooses is shown."""


def doctor(program: str, argv: list[str]) -> int:
    """What this machine has, what is missing and why, what `auto` chooses, and whether a training can start here.

    neobert doctor
    neobert doctor CONFIG.yaml --section.key value
    neobert doctor --json --no-network

    Computes for at most ten seconds: the chosen attention and loss against their definitions, matrix products, and the
    speed of the disk of trainer.output_dir. Data and tokenizer are not opened. A connection to the hub is opened, and
    nothing is sent. Exit code 0 when a training with the config (by default the quickstart) can start, else 2.
    """
    parser = build_parser(program, doctor.__doc__, allow_abbrev=False)
    parser.usage = f"{program} [CONFIG] [--section.key VALUE ...] [--json] [--no-network]"
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-network", action="store_true", help="do not try to reach the hub")
    args, settings = parser.parse_known_args(argv)
    from neobert.benchmark.installed import find_package_problems, read_requirements

    problems = find_package_problems(read_requirements())
    if problems:
        text = "\n".join([*(f"problem: {problem}" for problem in problems), "a training cannot start here"])
        print_answer({"can_start": False, "problems": problems}, text, as_json=args.json)
        return cli.EXIT_CODES["wrong_call"]
    from neobert.commands.training_commands import parse_command_line
    from neobert.config.load import split_arguments
    from neobert.errors import DataError

    named = split_arguments(settings)[1]
    words = settings if named else ["quickstart", *AUTOMATIC, *settings]
    config = parse_command_line(words, description=doctor.__doc__, program=program)
    if config.task != "pretraining":
        raise DataError(f"task: {config.task}; doctor reads the config of a pretraining, or none")
    from neobert.benchmark.doctor import examine

    seen = examine(config, network=not args.no_network)
    print_answer(seen.to_json(), seen.describe(" ".join(named) or "quickstart"), as_json=args.json)
    return 0 if seen.can_start else cli.EXIT_CODES["wrong_call"]
