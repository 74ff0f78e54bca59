"""A file as lines of bounded size: whatever a file holds, no more of it than `dataset.max_record_bytes` is in memory.

A longer line is read to its end in blocks that are thrown away, so a compressed file of a few megabytes that unfolds to
one line of gigabytes costs time and no memory.
"""

from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

from neobert.config.schema_data import MAX_RECORD_BYTES
from neobert.data.source.text import TooLong

_BLOCK = 1 << 20


class Line(NamedTuple):
    """A line with its end, or what is left to say of one that is too long."""

    content: bytes
    """Empty when the line is too long."""

    size: int
    """Bytes in the file."""

    problem: str | None = None
    """Why there is no content."""


class RecordFile:
    """A file that is read record by record. Lines that were read can be put back and are then read again."""

    def __init__(self, file: BinaryIO, max_record_bytes: int = MAX_RECORD_BYTES) -> None:
        self._file, self.max_record_bytes = file, max_record_bytes
        self._again: list[Line] = []
        """Lines put back, the next one last."""

    def read_line(self) -> Line | None:
        """The next line; None at the end of the file."""
        if self._again:
            return self._again.pop()
        limit = self.max_record_bytes
        content = self._file.readline(limit + 1)
        if not content:
            return None
        if len(content) <= limit:
            return Line(content, len(content))
        size, ended = len(content), content.endswith(b"\n")
        del content  # One block at a time, not the start of the line beside it.
        while not ended and (block := self._file.readline(_BLOCK)):
            size, ended = size + len(block), block.endswith(b"\n")
        return Line(b"", size, str(TooLong(size, limit)))

    def unread(self, lines: Iterable[Line]) -> None:
        """Gives back the last lines that were read, in their order."""
        self._again += reversed(list(lines))

    def read_rest(self) -> tuple[Line, int] | None:
        """All that is left as one piece, and the number of its lines; None at the end of the file."""
        limit = self.max_record_bytes
        content = self._file.read(limit + 1)
        size, num_lines, last = len(content), content.count(b"\n"), content[-1:]
        if size <= limit:
            return (Line(content, size), num_lines + (last != b"\n")) if content else None
        del content
        while block := self._file.read(_BLOCK):
            size, num_lines, last = size + len(block), num_lines + block.count(b"\n"), block[-1:]
        return Line(b"", size, str(TooLong(size, limit))), num_lines + (last != b"\n")

    def read(self, size: int) -> bytes:
        """At most so many bytes, of a file that no line was put back to."""
        assert not self._again
        return self._file.read(size)

    def seek(self, offset: int) -> None:
        """Goes to a byte of a seekable file."""
        self._again.clear()
        self._file.seek(offset)

    def tell(self) -> int:
        """The byte of a seekable file that is read next."""
        return self._file.tell() - sum(line.size for line in self._again)

    def close(self) -> None:
        self._file.close()
