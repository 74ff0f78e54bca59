"""Train the runs of a plan one by one and compare them: python scripts/experiments/compare.py PLAN --data FOLDER

Prints a table; it, results.json and the picture results.svg lie beside the runs. Type the same command again after an
interruption: finished runs are not made again, one that was killed goes on.
"""

import sys

from neobert import cli
from neobert.benchmark.experiment_plan import Place, check_plan, choose_variants, grid, load_plan
from neobert.benchmark.flags import build_parser, parse_arguments


def main() -> int:
    parser = build_parser(__doc__, file_help="plan, such as configs/experiments/optimizers.yaml")
    parser.add_argument("--only", metavar="NAMES", help="entries of the plan to run now, separated by commas")
    parser.add_argument("--check", action="store_true", help="check all configs, list the runs, train nothing")
    parser.add_argument("--keep-weights", action="store_true", help="keep the checkpoints of runs that were scored")
    options, overrides = parse_arguments(parser, sys.argv[1:])
    place = Place(
        output=options.output, data=options.data, overrides=tuple(overrides), keep_weights=options.keep_weights
    )
    plan = load_plan(options.file)
    chosen = choose_variants(plan, options.only)
    check_plan(chosen, place)
    from neobert.benchmark.experiments import compare
    from neobert.benchmark.trial import Stopped, check_data, use_threads
    from neobert.cli import EXIT_CODES

    use_threads(options.threads)
    check_data(place.data)
    if options.check:
        print("\n".join(job.name for variant in chosen.variants for job in grid(variant)))
        return 0
    try:
        print(compare(plan, chosen, place))
    except Stopped as stopped:
        cli.say(f"stopped ({stopped.reason}); type the same command to go on")
        return EXIT_CODES[stopped.reason]
    return 0


if __name__ == "__main__":
    cli.run(main)
