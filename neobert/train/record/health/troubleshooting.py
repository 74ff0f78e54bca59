"""The tables of docs/troubleshooting.md that are made from code.

python -m neobert.train.record.health.troubleshooting        # writes them into docs/troubleshooting.md
"""

import re
import sys
from pathlib import Path

from neobert.train.record.health.checks import CHECKS
from neobert.train.record.health.known_issues import KNOWN_ISSUES

_BLOCK = re.compile(r"(<!-- made from (\w+).*? -->\n).*?(<!-- end -->)", re.DOTALL)


def build_page(page: str) -> str:
    """The page with its tables made again; all else stays."""
    return _BLOCK.sub(lambda found: f"{found[1]}{_TABLES[found[2]]()}{found[3]}", page)


def _build_checks() -> str:
    rows = ["| check | looks at | says so when | what to do |", "|---|---|---|---|"]
    for name, check in CHECKS.items():
        more = "" if check.page.startswith("troubleshooting.md#health") else f" ([more]({check.page}))"
        rows.append(f"| `{name}` | {check.reads} | {check.threshold} | {check.advice}{more} |")
    return "\n".join(rows) + "\n"


def _build_issues() -> str:
    rows = ["| known issue | here | test |", "|---|---|---|"]
    for issue in KNOWN_ISSUES:
        rows.append(f"| {issue.issue} | {issue.here} | {', '.join(f'`{test}`' for test in issue.tests) or '-'} |")
    return "\n".join(rows) + "\n"


_TABLES = {"CHECKS": _build_checks, "KNOWN_ISSUES": _build_issues}


def main() -> None:
    """Write docs/troubleshooting.md in the current folder's `docs`."""
    target = Path("docs/troubleshooting.md")
    if not target.is_file():
        sys.exit(f"{target} is not here: run this in the root of the repository")
    target.write_text(build_page(target.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
