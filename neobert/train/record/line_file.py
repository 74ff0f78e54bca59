"""A file of one JSON object a line that survives kills and full disks."""

import json
import math
import os
from pathlib import Path
from typing import Any

from neobert.config.nesting import parse_json
from neobert.disk import write_text


class LineFile:
    """An append-only file of one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten: list[str] = []

    def read(self) -> list[dict[str, Any]]:
        """All lines; one torn by a kill is left out."""
        if not self._path.is_file():
            return []
        lines = []
        for text in self._path.read_text(errors="replace").splitlines():
            try:
                line = parse_json(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
        return lines

    def rewrite(self, lines: list[dict[str, Any]]) -> None:
        """Replaces the file: after a kill at any instant it holds the old lines or these."""
        if not self._path.is_file():
            return
        write_text(self._path, "".join(map(_encode, lines)))

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Adds lines and flushes them to the disk; a reader never sees half of one after a clean exit.

        Raises:
            OSError: they could not be written; the next call writes them too.
        """
        self._unwritten += map(_encode, lines)
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a") as handle:
                handle.writelines(self._unwritten)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError:
            if self._path.exists():
                os.truncate(self._path, size)  # Half a line would spoil the line after it.
            raise
        self._unwritten.clear()


def _encode(line: dict[str, Any]) -> str:
    """A number that is not finite becomes null: JSON cannot write it."""
    numbers = {k: None for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps(line | numbers, allow_nan=False) + "\n"
