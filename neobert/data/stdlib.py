"""`python_stdlib`: the source code of the running interpreter's standard library, a corpus that is always there.

About ten megabytes of real code and English prose. Test suites and installed packages are left out, so that the
documents are the same with and without a virtual environment.
"""

import hashlib
import sysconfig
from pathlib import Path

from neobert.data.errors import DataError
from neobert.data.jsonl import fingerprint_files
from neobert.data.spec import PYTHON_STDLIB
from neobert.data.text import WHOLE, Record, Records, Span

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class StdlibSource:
    """Every .py file of the standard library, in an order keyed by a hash of its path."""

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_path("stdlib"))
        relative = [path.relative_to(self._root) for path in self._root.rglob("*.py")]
        # By a hash of the path: neighbours in a folder are alike, and the first documents should be a fair sample.
        chosen = sorted((p for p in relative if not _LEFT_OUT.intersection(p.parts)), key=_hash_path)
        self._paths = [self._root / path for path in chosen]
        if not self._paths:
            raise DataError(
                f"dataset.name: {PYTHON_STDLIB}, but this interpreter keeps no sources in {self._root}; "
                "use another interpreter, or name text with dataset.path"
            )
        self.notes = [f"{len(self._paths)} source files of {self._root}"]
        self.fingerprint = fingerprint_files(self._paths)

    def records(self, span: Span = WHOLE) -> Records:
        for number, path in list(enumerate(self._paths))[span.after["file"] if span.after else 0 :]:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                text = ""
            yield Record(number, text if text.strip() else None, None, {"file": number + 1})

    def count(self) -> int | None:
        return len(self._paths)

    def part(self, number: int, count: int) -> Span:
        raise DataError("this source cannot be cut into parts yet; tokenise it without --shard")


def _hash_path(path: Path) -> bytes:
    return hashlib.sha256(f"{PYTHON_STDLIB}/{path.as_posix()}".encode()).digest()
