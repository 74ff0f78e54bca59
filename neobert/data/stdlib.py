"""`python_stdlib`: the source code of the running interpreter's standard library, a corpus that is always there.

About ten megabytes of real code and English prose. Test suites and installed packages are left out, so that the
documents are the same with and without a virtual environment.
"""

import sysconfig
from pathlib import Path

from neobert.data.errors import DataError
from neobert.data.jsonl import fingerprint_files
from neobert.data.text import Record, Records

PYTHON_STDLIB = "python_stdlib"

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class StdlibSource:
    """Every .py file of the standard library, sorted by its path."""

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_path("stdlib"))
        self._paths = sorted(
            path for path in self._root.rglob("*.py") if not _LEFT_OUT.intersection(path.relative_to(self._root).parts)
        )
        if not self._paths:
            raise DataError(
                f"dataset.name: {PYTHON_STDLIB}, but this interpreter keeps no sources in {self._root}; "
                "use another interpreter, or name text with dataset.path"
            )
        self.notes = [f"{len(self._paths)} source files of {self._root}"]
        self.fingerprint = fingerprint_files(self._paths)

    def records(self) -> Records:
        for number, path in enumerate(self._paths):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                text = ""
            yield Record(number, text if text.strip() else None, None, {"file": number + 1})
