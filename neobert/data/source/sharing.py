"""Shards shared out to lanes and to machines.

| the shards are | lanes | `part` |
|---|---|---|
| plain files of lines | byte ranges, equal to a byte | byte ranges |
| row groups of Parquet | runs of about equal bytes | the same |
| files that cannot be cut, shards of the hub | every n-th shard | runs of about equal bytes |

A cursor in source order is `{"shard": number, "position": position in it}`; a null position is before its first record.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

from neobert.data.lazy import Lazy
from neobert.data.rows.lanes import State
from neobert.data.source.documents import TextDocuments
from neobert.data.source.text import (
    STREAM_LANES,
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

    def readers(self, sharding: Sharding, span: Span = WHOLE) -> Sequence[LaneReader]:
        parts = span.shards(len(self._sizes))

        def build(count: int) -> Sequence[LaneReader]:
            return Lazy(
                count,
                lambda lane: ShardReader([self.build_shard(*part) for part in parts[lane::count]], sharding, lane),
            )

        chosen = choose_num_lanes(len(parts), sharding.most)
        return deal(build, sharding, most=len(parts), chosen=chosen, label=self._label)

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


def deal(
    build: Callable[[int], Sequence[LaneReader]], sharding: Sharding, *, most: int, chosen: int, label: str
) -> Sequence[LaneReader]:
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
    return Lazy(sharding.num_lanes, lambda lane: EveryNth(copies[lane // count][lane % count], lane // count, sharers))


def fit_lanes(most: int, limit: int) -> int:
    """Lanes for data that is worth `limit` of them: `most`, else the largest part of it above 16, else up to 16.

    A rank reads alone what is in a lane of its own: where `most` is the number of processes, each lane is then read by
    equally many of them.

    >>> fit_lanes(16, 5), fit_lanes(24, 100), fit_lanes(96, 50), fit_lanes(96, 20)
    (5, 24, 48, 16)
    """
    parts = [n for n in range(STREAM_LANES + 1, min(most, limit) + 1) if most % n == 0]
    return parts[-1] if parts else max(1, min(STREAM_LANES, most, limit))


def choose_num_lanes(num_shards: int, lanes: int = STREAM_LANES) -> int:
    """Lanes for shards that cannot be cut: many, up to `lanes`, whose parts differ little in size.

    Up to 16, equal parts where half of the lanes can be kept for them; else the last part of a round may be missing in
    a few.
    """
    even = [n for n in range(STREAM_LANES + 1, min(lanes, num_shards) + 1) if lanes % n == 0]
    even = [n for n in even if -(-num_shards // n) <= 1.1 * (num_shards // n)]
    if even:
        return even[-1]
    most = max(1, min(STREAM_LANES, lanes, num_shards))
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


def cut_ranges(ranges: Sequence[tuple[int, int, int]], count: int) -> Sequence[list[tuple[int, int, int]]]:
    """Cuts (file, begin, end) ranges, seen as one stream of bytes, into `count` equal parts, each when it is needed.

    >>> list(cut_ranges([(0, 0, 6), (1, 0, 4)], 2))
    [[(0, 0, 5)], [(0, 5, 6), (1, 0, 4)]]
    """
    ends = list(accumulate(end - begin for _, begin, end in ranges))
    total = ends[-1] if ends else 0

    def cut(part: int) -> list[tuple[int, int, int]]:
        low, high = total * part // count, total * (part + 1) // count
        pieces = []
        for number in range(bisect_right(ends, low), len(ranges)):
            file, begin, end = ranges[number]
            passed = ends[number] - (end - begin)
            if passed >= high:
                break
            start, stop = max(begin, begin + low - passed), min(end, begin + high - passed)
            if start < stop:
                pieces.append((file, start, stop))
        return pieces

    return Lazy(count, cut)


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
