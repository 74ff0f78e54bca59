"""`log.jsonl` and `events.jsonl`: files of one JSON object a line, which survive kills and full disks."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neobert.config.nesting import parse_json

TRACKED_SECTIONS = (
    "task",
    "seed",
    "model",
    "dataset",
    "tokenizer",
    "datacollator",
    "optimizer",
    "scheduler",
    "trainer",
    "distill",
    "contrastive",
    "finetune",
    "glue",
)
"""What a tracker may know of a config; a section that is not listed is not sent."""


BLOCK_BYTES = 1 << 20
"""Of a file that is read from its end."""


class LineFile:
    """An append-only file of one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten: list[str] = []

    def read(self) -> list[dict[str, Any]]:
        """All lines; one torn by a kill is left out."""
        if not self._path.is_file():
            return []
        found = map(_parse, self._path.read_text(errors="replace").splitlines())
        return [line for line in found if line is not None]

    def read_back(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(byte after the line, line) from the last line to the first, in blocks: whoever stops early reads no more.

        What a kill has torn, after the last end of a line, is left out, like everything that is no line of ours.
        """
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            begin, rest = file.seek(0, os.SEEK_END), b""
            while begin:
                end, begin = begin, max(0, begin - BLOCK_BYTES)
                file.seek(begin)
                rest = file.read(end - begin) + rest
                first = 0 if begin == 0 else rest.find(b"\n") + 1
                offset = begin + rest.rfind(b"\n") + 1  # After the last whole line of the block.
                for text in reversed(rest[first : offset - begin].split(b"\n")[:-1]):
                    line = _parse(text.decode(errors="replace"))
                    if line is not None:
                        yield offset, line
                    offset -= len(text) + 1
                rest = rest[:first]

    def newest_first(self) -> Iterator[dict[str, Any]]:
        """The lines alone of `read_back`."""
        return (line for _, line in self.read_back())

    def cut(self, size: int) -> None:
        """Drops what is after so many bytes; a file that is no longer stays as it is."""
        if not self._path.is_file() or self._path.stat().st_size <= size:
            return
        with self._path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())

    def cut_torn(self) -> None:
        """Drops half a line at the end, which a kill has left, before another one is added."""
        self.cut(next((end for end, _ in self.read_back()), 0))

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


def drop_later(log: LineFile, step: int) -> tuple[list[dict[str, Any]], set[str]]:
    """Drops the lines after `step` of a log, all of them at step 0: the first evaluation is made again too.

    Steps only rise in the file, so its end is read and the rest stays as it is.

    Returns:
        The lines of later steps, and the kinds of lines there are of this one.
    """
    size, later, here = 0, [], set[str]()
    for end, line in log.read_back():
        if 0 < step >= line["step"]:
            size = max(size, end)
            if line["step"] < step:
                break
            here.add(line["kind"])
        elif line["kind"] == "step":
            later.append(line)
    log.cut(size)
    return later[::-1], here


def _parse(text: str) -> dict[str, Any] | None:
    """A line; None where it is torn, or none of ours."""
    try:
        line = parse_json(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _encode(line: dict[str, Any]) -> str:
    """A number that is not finite becomes null: JSON cannot write it."""
    numbers = {k: None for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps(line | numbers, allow_nan=False) + "\n"
