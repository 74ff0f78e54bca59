"""Where the time of profiled steps went: `python scripts/analyze_profile.py RUN_FOLDER_OR_TRACE [--json]`.

Train with --trainer.profiler_steps_start N --trainer.profiler_steps K to have a trace.
"""

import argparse
import sys
from pathlib import Path

from neobert.benchmark.profile_analysis import ProfileError, analyse_path, describe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder of a run, or a trace of torch's profiler")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    try:
        analysis = analyse_path(arguments.path)
    except ProfileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(analysis.as_json() if arguments.json else describe(analysis))
    return 0


if __name__ == "__main__":
    sys.exit(main())
