"""Rewrite a config of other NeoBERT code for this one: python scripts/migrate_config.py OLD.yaml > new.yaml"""

import sys
from pathlib import Path

from neobert import cli
from neobert.config.migrate import MigrationError, migrate
from neobert.config.source import YamlError, read_yaml_text
from neobert.output import print_result


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(f"{__doc__}\nThe new file goes to stdout, the list of edits to stderr.", file=sys.stderr)
        return 0 if sys.argv[1:] in (["--help"], ["-h"]) else 2
    try:
        text, edits = migrate(read_yaml_text(Path(sys.argv[1])))
    except (MigrationError, YamlError) as error:
        print(f"{sys.argv[1]}: {error}", file=sys.stderr)
        return 2
    print_result(text, end="")
    print(f"{len(edits)} edits:", *(f"  - {edit}" for edit in edits), sep="\n", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
