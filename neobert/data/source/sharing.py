"""Shards shared out to lanes and to machines.

| the shards are | lanes | `part` |
|---|---|---|
| plain files of lines | byte ranges, equal to a byte | byte ranges |
| row groups of Parquet | runs of about equal bytes | the same |
| files that cannot be cut, shards of the hub | every n-th shard | runs of about equal bytes |

A cursor in source order is `{"shard": number, "position": position in it}`; a null position is before its first record.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate

from neobert.data.rows.lanes import State
from neobert.data.source.documents import TextDocuments
from neobert.data.source.text import (
    WHOLE,
    EveryNth,
    LaneReader,
    Records,
    Shard,
    Sharding,
    ShardReader,
    Span,
    read_shards,
)
from neobert.errors import DataError

STREAM_LANES = 16
"""Lanes of a stream when `dataset.num_lanes` is null and the data is large enough."""

MIN_LANE_BYTES = 256 * 1024
"""A smaller stretch of text is not worth a lane of its own: its windows would pack badly."""


class ShardedSource(TextDocuments):
    """A source made of shards with a number each. Subclasses say how a shard is built and how large it is."""

    def __init__(self, label: str, sizes: Sequence[int]) -> None:
        self._label, self._sizes = label, list(sizes)

    def build_shard(self, number: int, span: Span = WHOLE) -> Shard:
        """A shard, or what `span` leaves of it."""
        raise NotImplementedError

    def records(self, span: Span = WHOLE) -> Records:
        parts = span.shards(len(self._sizes))
        if not parts:
            return
        first, (position, _) = parts[0]
        # The first shard starts at its cursor, not by a cut, so that its records keep their positions.
        shards = [self.build_shard(number, Span(until=part.until)) for number, part in parts]
        for record in read_shards(shards, {"shard": 0, "position": position}):
            yield record._replace(cursor=record.cursor | {"shard": record.cursor["shard"] + first})

    def readers(self, sharding: Sharding, span: Span = WHOLE) -> list[LaneReader]:
        parts = span.shards(len(self._sizes))
        return deal(
            lambda count: self._every_nth(parts, sharding, count),
            sharding,
            most=len(parts),
            chosen=choose_num_lanes(len(parts)),
            label=self._label,
        )

    def count(self, span: Span = WHOLE) -> int | None:
        return None

    def cursor_after(self, number: int) -> State:
        left = number
        for shard in range(len(self._sizes)):
            position, passed = self.position_after(shard, left)
            if passed == left:
                return {"shard": shard, "position": position}
            left -= passed
        raise too_few(self._label, number, number - left)

    def position_after(self, shard: int, number: int) -> tuple[State | None, int]:
        """Position after the record with this number in a shard, or after its last one, and how many that were."""
        position, passed = None, 0
        for record in self.build_shard(shard).read(None):
            position, passed = record.cursor, passed + 1
            if passed == number:
                break
        return position, passed

    def part(self, number: int, count: int) -> Span:
        check_part(number, count, len(self._sizes), self._label)
        first, last = (choose_borders(self._sizes, count)[n] for n in (number, number + 1))
        return Span(
            after={"shard": first, "position": None} if number else None,
            until={"shard": last, "position": None} if number + 1 < count else None,
        )

    def _every_nth(self, parts: list[tuple[int, Span]], sharding: Sharding, count: int) -> list[LaneReader]:
        return [
            ShardReader([self.build_shard(*part) for part in parts[lane::count]], sharding, lane)
            for lane in range(count)
        ]


def deal(
    build: Callable[[int], list[LaneReader]], sharding: Sharding, *, most: int, chosen: int, label: str
) -> list[LaneReader]:
    """The readers of a source.

    Args:
        build: makes a number of readers over the source.
        most: the largest number of parts that the source is worth cutting into.
        chosen: the number of readers where `sharding` leaves it open.

    Raises:
        DataError: `sharding.num_lanes` is more than `most`, and not `sharding.exact`.
    """
    if sharding.num_lanes is None:
        return build(chosen)
    if sharding.num_lanes <= most:
        return build(sharding.num_lanes)
    if not sharding.exact:
        raise DataError(
            f"dataset.num_lanes: {sharding.num_lanes}, but {label} has {most} shards to split; "
            "write at most that, or leave it null"
        )
    # A divisor, so that every part is shared by as many lanes. Each lane reads by objects of its own.
    count = max(n for n in range(1, max(1, most) + 1) if sharding.num_lanes % n == 0)
    sharers = sharding.num_lanes // count
    copies = [build(count) for _ in range(sharers)]
    return [EveryNth(copies[lane // count][lane % count], lane // count, sharers) for lane in range(sharding.num_lanes)]


def choose_num_lanes(num_shards: int) -> int:
    """Lanes for shards that cannot be cut: many, up to 16, whose parts differ little in size.

    Equal parts where half of the lanes can be kept for them; else the last part of a round may be missing in a few.
    """
    most = max(1, min(STREAM_LANES, num_shards))
    equal = max(n for n in range(1, most + 1) if -(-num_shards // n) <= 1.1 * (num_shards // n))
    if 2 * equal >= most:
        return equal
    return max(n for n in range(1, most + 1) if -(-num_shards // n) * n <= 1.1 * num_shards)


def choose_borders(sizes: Sequence[int], count: int) -> list[int]:
    """Cuts shards into `count` runs of about equal size, none of them empty: the index where each starts, and the end.

    >>> choose_borders([5, 1, 1, 1, 4], 3)
    [0, 1, 4, 5]
    """
    weights = sizes if any(sizes) else [1] * len(sizes)
    starts = list(accumulate(weights, initial=0))
    borders = [0]
    for part in range(1, count):
        target = starts[-1] * part / count
        index = bisect_left(starts, target)
        if index and target - starts[index - 1] <= starts[index] - target:
            index -= 1
        borders.append(min(max(index, borders[-1] + 1), len(sizes) - (count - part)))
    return [*borders, len(sizes)]


def cut_ranges(ranges: Sequence[tuple[int, int, int]], count: int) -> list[list[tuple[int, int, int]]]:
    """Cuts (file, begin, end) ranges, seen as one stream of bytes, into `count` equal parts.

    >>> cut_ranges([(0, 0, 6), (1, 0, 4)], 2)
    [[(0, 0, 5)], [(0, 5, 6), (1, 0, 4)]]
    """
    total = sum(end - begin for _, begin, end in ranges)
    parts = []
    for part in range(count):
        low, high = total * part // count, total * (part + 1) // count
        pieces, passed = [], 0
        for file, begin, end in ranges:
            start, stop = max(begin, begin + low - passed), min(end, begin + high - passed)
            if start < stop:
                pieces.append((file, start, stop))
            passed += end - begin
        parts.append(pieces)
    return parts


def check_part(number: int, count: int, most: int, label: str) -> None:
    """Raises when part `number` of `count` cannot be taken from a source with at most `most` parts.

    Raises:
        DataError: naming the largest count.
    """
    if not 0 <= number < count <= most:
        raise DataError(f"{label} cannot be cut into {count} parts; the largest possible number is {most}")


def too_few(label: str, requested: int, found: int) -> DataError:
    """The error of a document number beyond the end."""
    return DataError(f"{label} has {found} records, and number {requested} was requested; use a smaller number")
