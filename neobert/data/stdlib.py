"""`python_stdlib`: the source code of the running interpreter's standard library, a corpus that is always there.

About ten megabytes of real code and English prose. Test suites and installed packages are left out, so that the
documents are the same with and without a virtual environment.
"""

import hashlib
import sysconfig
from pathlib import Path

from neobert.data.arrow import IndexedTexts
from neobert.data.errors import DataError
from neobert.data.files import fingerprint_files, local_file
from neobert.data.spec import PYTHON_STDLIB

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class StdlibSource(IndexedTexts):
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
        files = [local_file(path) for path in self._paths]
        self.num_bytes = sum(file.size for file in files)
        self.fingerprint = fingerprint_files(files)

    def __len__(self) -> int:
        return len(self._paths)

    def text(self, document: int) -> str | None:
        try:
            return self._paths[document].read_text(encoding="utf-8")
        except UnicodeDecodeError:  # A few files show other encodings; they are no prose and no bad data.
            return None


def _hash_path(path: Path) -> bytes:
    return hashlib.sha256(f"{PYTHON_STDLIB}/{path.as_posix()}".encode()).digest()
