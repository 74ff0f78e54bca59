"""Prints the lowest version of every dependency that pyproject.toml allows, one `name==version` a line, for pip.

The package's own dependencies, and what the tests need: those of `dev` that have a floor. Exits with an error where a
dependency of the package has none.
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
needed = [(requirement, True) for requirement in project["dependencies"]]
needed += [(requirement, False) for requirement in project["optional-dependencies"]["dev"]]
for requirement, required in needed:
    floor = re.match(r"([\w.-]+)[^>]*>=\s*([\w.]+)", requirement)
    if floor:
        print(f"{floor[1]}=={floor[2]}")
    elif required:
        sys.exit(f"pyproject.toml: {requirement!r} names no lowest version; write NAME>=VERSION")
