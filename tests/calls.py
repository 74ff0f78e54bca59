"""Calling a script as a user does, in this process: its libraries are imported already."""

import runpy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

SCRIPTS = Path(__file__).parents[1] / "scripts"


def call(script: str, *words: object) -> Any:
    """The exit code of `scripts/<script>`; what it prints goes where pytest captures it."""
    with patch.object(sys, "argv", [f"scripts/{script}", *map(str, words)]):
        try:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        except SystemExit as ended:
            return ended.code
    raise AssertionError(f"{script} did not end through cli.run")
