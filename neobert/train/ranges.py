"""Ranges of consecutive numbers, as they are joined and written."""

from collections.abc import Iterable, Sequence


def join_ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Half-open ranges of the numbers: 3 4 5 9 -> (3, 6), (9, 10)."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return ranges


def describe_ranges(ranges: Sequence[tuple[int, int]]) -> str:
    """`3 to 5, 9` for (3, 6), (9, 10)."""
    return ", ".join(str(start) if end == start + 1 else f"{start} to {end - 1}" for start, end in ranges)
