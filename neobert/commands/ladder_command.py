"""`neobert ladder`: small sizes predict a larger one. Libraries are imported after the arguments are read."""

from neobert import cli
from neobert.commands.flags import build_experiment_parser, parse_experiment
from neobert.config.dial import read_depth, read_ratio

TOKENS_PER_PARAMETER = "0.6"
"""Depths 1 to 5 then take about an hour of two cores with AMX."""


def ladder(program: str, argv: list[str]) -> None:
    """Train sizes of the dial one after another, and predict the held-out loss of a larger one.

    neobert ladder --data FOLDER --depths 1,2,3,4 --predict 5 --check

    Prints the sizes, the law through them and the prediction, and with --check how far it was off; ladder.json,
    ladder.md and ladder.svg are beside the runs. Type the same command again after an interruption: sizes that are
    finished are not trained again, one that was killed resumes.
    """
    parser = build_experiment_parser(program, ladder.__doc__, name="ladder")
    parser.add_argument("--depths", default="1,2,3,4", help="three or more (default %(default)s)")
    parser.add_argument("--predict", default="5", help="depth that is predicted (default %(default)s)")
    parser.add_argument(
        "--check", action="store_true", help="train that one too, and say how far off the prediction was"
    )
    parser.add_argument("--tokens_per_parameter", default=TOKENS_PER_PARAMETER, help="default %(default)s")
    options, overrides = parse_experiment(parser, argv)
    depths = tuple(read_depth(text.strip(), "--depths") for text in options.depths.split(","))
    predicted = read_depth(options.predict, "--predict")
    if len(set(depths)) < 3 or len(set(depths)) < len(depths) or predicted in depths:
        parser.error(
            f"--depths: {options.depths}; write three or more different depths, none of them --predict {predicted}"
        )
    ratio = read_ratio(options.tokens_per_parameter)
    from neobert.benchmark.experiment_plan import Workspace, check_plan

    workspace = Workspace(output=options.output, data=options.data, overrides=tuple(overrides))
    from neobert.benchmark import trial
    from neobert.benchmark.ladder import Ladder, climb

    climbed = Ladder(depths=depths, predict=predicted, tokens_per_parameter=ratio, workspace=workspace)
    check_plan(climbed.plan(), workspace)
    trial.use_threads(options.threads)
    trial.check_data(options.data)
    cli.print_result(climb(climbed, check=options.check))
