"""What a run has written so far: `log.jsonl`, read once a line while it grows, and `events.jsonl`."""

import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neobert.config.nesting import parse_json

Line = dict[str, Any]

COLUMNS = ("step", "loss", "grad_norm", "lr", "num_tokens", "num_targets")
"""What is kept of a step's line: runs have as many as steps."""


_TOO_LARGE = 1e300
"""JSON knows integers that no float can hold."""


def as_number(value: Any) -> float | None:
    """A finite number, or None for all that JSON can hold instead."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < _TOO_LARGE else None


@dataclass(slots=True)
class RunLog:
    """The lines of a `log.jsonl`; each `update` reads those that were added, or all of a file that was replaced."""

    path: Path
    steps: dict[str, "array[float]"] = field(default_factory=lambda: {name: array("d") for name in COLUMNS})
    """Columns over the lines of kind `step`; NaN where there is no number."""

    lines: dict[str, list[Line]] = field(default_factory=dict)
    """The lines of all other kinds."""

    last_step: int = 0

    _file: tuple[int, int] | None = None
    _offset: int = 0

    def update(self) -> None:
        """Reads what is new. A last line without its end is left for the next time, one that is no record is dropped.

        Raises:
            OSError: the file cannot be read.
        """
        with self.path.open("rb") as handle:
            status = self.path.stat()
            if self._file != (status.st_dev, status.st_ino) or status.st_size < self._offset:
                self.steps, self.lines = {name: array("d") for name in COLUMNS}, {}
                self.last_step = self._offset = 0
                self._file = (status.st_dev, status.st_ino)
            handle.seek(self._offset)
            for text in handle:
                if not text.endswith(b"\n"):
                    break
                self._offset += len(text)
                self._add(text)

    def _add(self, text: bytes) -> None:
        line = _parse(text)
        if line is None:
            return
        self.last_step = max(self.last_step, line["step"])
        if line.get("kind") == "step":
            for name, column in self.steps.items():
                number = as_number(line.get(name))
                column.append(math.nan if number is None else number)
        else:
            self.lines.setdefault(str(line.get("kind")), []).append(line)


def read_events(path: Path) -> list[Line]:
    """The lines of an `events.jsonl`, none of a file that is not there."""
    if not path.is_file():
        return []
    return [line for text in path.read_bytes().splitlines() if (line := _parse(text)) is not None]


def _parse(text: bytes) -> Line | None:
    try:
        line = parse_json(text)
    except ValueError:
        return None
    is_record = isinstance(line, dict) and isinstance(line.get("step"), int)
    return line if is_record else None
