"""Text from JSON lines, plain or gzipped, read with byte cursors.

Plain files are cut into byte ranges, one for each lane: a line belongs to the range that holds its first byte, so no
line is lost or read twice. A gzipped file cannot be cut and goes whole to one lane; to go on in its middle everything
before must be decompressed, therefore consecutive windows keep the file open.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from neobert.data.columns import choose_text_column
from neobert.data.errors import DataError
from neobert.data.lanes import State
from neobert.data.text import WHOLE, Reader, Record, Records, ShardReader, Span, read_shards

STREAM_LANES = 16
"""Lanes of a stream when `dataset.num_lanes` is null and the data is large enough."""

MIN_LANE_BYTES = 256 * 1024
"""A smaller stretch of text is not worth a lane of its own: its windows would pack badly."""

_GZIP_RATIO = 3
"""Bytes of text in a byte of a gzipped file, about."""

_COLUMN_SAMPLE = 100
_FINGERPRINT_BLOCK = 4096


class JsonlShard:
    """A file of JSON lines, or the byte range [begin, end) of one. `begin` and `end` need not be line starts."""

    def __init__(self, path: Path, number: int, column: str, begin: int = 0, end: int | None = None) -> None:
        self._parked: tuple[int, BinaryIO] | None = None
        self._path, self._number, self._column, self._begin, self._end = path, number, column, begin, end
        size = path.stat().st_size
        self.size = size * _GZIP_RATIO if is_gzipped(path) else (size if end is None else end) - begin

    def read(self, position: State | None) -> Records:
        """Records after `position`, `{"offset": byte in the uncompressed file, "line": lines since begin}`."""
        offset, line = (None, 0) if position is None else (position["offset"], position["line"])
        file, offset = self._open(offset)
        try:
            while self._end is None or offset < self._end:
                raw = self._read_line(file)
                if not raw:
                    break
                start, offset, line = offset, offset + len(raw), line + 1
                text, problem = parse_line(raw, self._column)
                if problem is not None:
                    problem = f"{self._path}:{self._lines_before() + line}: {problem}"
                yield Record((self._number << 40) | start, text, problem, {"offset": offset, "line": line})
        except GeneratorExit:
            self._parked = (offset, file)
            raise
        except BaseException:
            file.close()
            raise
        file.close()

    def __del__(self) -> None:
        if self._parked is not None:
            self._parked[1].close()

    def _open(self, offset: int | None) -> tuple[BinaryIO, int]:
        parked, self._parked = self._parked, None
        if parked is not None:
            if parked[0] == offset:
                return parked[1], parked[0]
            parked[1].close()
        file = open_binary(self._path)
        if offset is not None:
            file.seek(offset)
        elif self._begin:
            # The line that reaches over `begin` belongs to the range before; one byte back, in case a line ends there.
            file.seek(self._begin - 1)
            file.readline()
        return file, file.tell() if offset is None else offset

    def _read_line(self, file: BinaryIO) -> bytes:
        try:
            return file.readline()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{self._path} cannot be decompressed ({error}); restore the file, or take it out of dataset.path"
            ) from error

    def _lines_before(self) -> int:
        """Lines of the file before this range: counted only to tell the place of a bad one."""
        left, count, last = self._begin, 0, b"\n"
        with open_binary(self._path) as file:
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                left, count, last = left - len(block), count + block.count(b"\n"), block[-1:]
        return count + (last != b"\n")


def open_binary(path: Path) -> BinaryIO:
    """A file opened for reading bytes, decompressed by its name."""
    return cast(BinaryIO, gzip.open(path, "rb")) if is_gzipped(path) else path.open("rb")


def is_gzipped(path: Path) -> bool:
    return path.suffix == ".gz"


def parse_line(raw: bytes, column: str) -> tuple[str | None, str | None]:
    """(text, problem) of a line; both None when it is blank or has no text."""
    if not raw.strip():
        return None, None
    try:
        record = json.loads(raw.decode("utf-8"))
        text = record.get(column) if isinstance(record, dict) else None
        if isinstance(text, str) and not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError:
        return None, "the text holds half of a surrogate pair"
    except (ValueError, RecursionError) as error:
        return None, str(error)
    if not isinstance(record, dict):
        return None, f"a JSON object was expected, not {type(record).__name__}"
    return (text, None) if isinstance(text, str) and text.strip() else (None, None)


class JsonlSource:
    """JSON lines files, read in the order of their names."""

    def __init__(self, paths: Sequence[Path], column: str | None) -> None:
        self._paths = sorted(paths)
        self._column, note = self._choose_column(column)
        self.notes = [note]
        self.fingerprint = fingerprint_files(self._paths)

    def records(self, span: Span = WHOLE) -> Records:
        shards = [JsonlShard(path, number, self._column) for number, path in enumerate(self._paths)]
        return read_shards(shards, span.after or {"shard": 0, "position": None})

    def count(self) -> int | None:
        return None

    def part(self, number: int, count: int) -> Span:
        raise DataError("this source cannot be cut into parts yet; tokenise it without --shard")

    def readers(self, *, seed: int, num_lanes: int | None, after: State | None) -> list[Reader]:
        first, begin = (0, 0) if after is None else (after["shard"], after["position"]["offset"])
        if any(map(is_gzipped, self._paths)):
            shards = [
                JsonlShard(path, number, self._column, begin if number == first else 0)
                for number, path in enumerate(self._paths)
                if number >= first
            ]
            count = num_lanes or choose_num_lanes(len(shards))
            return [ShardReader(shards[lane::count], seed, lane) for lane in range(count)]
        sizes = [path.stat().st_size for path in self._paths]
        spans = [(n, begin if n == first else 0, size) for n, size in enumerate(sizes) if n >= first]
        total = sum(end - start for _, start, end in spans)
        count = num_lanes or max(1, min(STREAM_LANES, total // MIN_LANE_BYTES))
        parts = cut_spans(spans, count)
        return [
            ShardReader([JsonlShard(self._paths[n], n, self._column, a, b) for n, a, b in part], seed, lane)
            for lane, part in enumerate(parts)
        ]

    def _choose_column(self, wanted: str | None) -> tuple[str, str]:
        """The text column and a note, from the first records that can be read."""
        text_columns: dict[str, None] = {}
        others: dict[str, None] = {}
        for record in self._sample():
            for name, value in record.items():
                (text_columns if isinstance(value, str) else others)[name] = None
        place = ", ".join(str(path) for path in self._paths[:3]) + (", ..." if len(self._paths) > 3 else "")
        return choose_text_column(list(text_columns), list(others), wanted, place)

    def _sample(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for path in self._paths:
            with open_binary(path) as file:
                for number, raw in enumerate(file):
                    if number == 0 and raw.lstrip()[:1] == b"[":
                        raise DataError(
                            f"{path} holds one JSON array; one object a line is needed. Convert it, for example with "
                            f"`jq -c '.[]' {path.name} > {path.stem}.jsonl`, and name the new file in dataset.path"
                        )
                    try:
                        record = json.loads(raw)
                    except ValueError:
                        continue
                    if isinstance(record, dict):
                        found.append(record)
                    if len(found) == _COLUMN_SAMPLE:
                        return found
        return found


def choose_num_lanes(num_shards: int) -> int:
    """Lanes for shards that cannot be cut: many, up to 16, whose shares differ little in size.

    Equal shares where half of the lanes can be kept for them; else the last share of a round may be missing in a few.
    """
    most = min(STREAM_LANES, num_shards)
    equal = max(n for n in range(1, most + 1) if -(-num_shards // n) <= 1.1 * (num_shards // n))
    if 2 * equal >= most:
        return equal
    return max(n for n in range(1, most + 1) if -(-num_shards // n) * n <= 1.1 * num_shards)


def cut_spans(spans: Sequence[tuple[int, int, int]], count: int) -> list[list[tuple[int, int, int]]]:
    """Cuts (file, begin, end) spans, seen as one stream of bytes, into `count` equal parts.

    >>> cut_spans([(0, 0, 6), (1, 0, 4)], 2)
    [[(0, 0, 5)], [(0, 5, 6), (1, 0, 4)]]
    """
    total = sum(end - begin for _, begin, end in spans)
    parts = []
    for part in range(count):
        low, high = total * part // count, total * (part + 1) // count
        pieces, passed = [], 0
        for file, begin, end in spans:
            start, stop = max(begin, begin + low - passed), min(end, begin + high - passed)
            if start < stop:
                pieces.append((file, start, stop))
            passed += end - begin
        parts.append(pieces)
    return parts


def fingerprint_files(paths: Sequence[Path]) -> str:
    """sha256 of the names and sizes of files and of 16 blocks of each, spread evenly."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for block in range(16):
                file.seek(max(0, size - _FINGERPRINT_BLOCK) * block // 15)
                digest.update(file.read(_FINGERPRINT_BLOCK))
    return f"sha256:{digest.hexdigest()}"
