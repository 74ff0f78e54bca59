"""Where the time of profiled steps went: `python scripts/analyze_profile.py RUN_FOLDER_OR_TRACE [--json]`.

Train with --trainer.profiler_steps_start N --trainer.profiler_steps K to have a trace.
"""

import argparse
from pathlib import Path

from neobert import cli
from neobert.benchmark.profile_analysis import analyse_path, describe
from neobert.output import print_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder of a run, or a trace of torch's profiler")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    analysis = analyse_path(arguments.path)
    print_result(analysis.as_json() if arguments.json else describe(analysis))


if __name__ == "__main__":
    cli.run(main)
