"""A histogram of lengths as an SVG picture, written by hand."""

from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 720, 320, 70, 40, 50


def draw_lengths(histogram: Sequence[dict[str, int]], title: str) -> str:
    """One bar for each `{"from", "to", "documents"}`, with the share of the documents above it."""
    total = max(1, sum(entry["documents"] for entry in histogram))
    most = max(1, *(entry["documents"] for entry in histogram))
    step = (_WIDTH - _LEFT - 20) / len(histogram)
    room = _HEIGHT - _TOP - _BOTTOM
    base = _HEIGHT - _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
        f'font-size="11">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_WIDTH / 2}" y="20" font-size="14" text-anchor="middle">{escape(title)}</text>',
        f'<line x1="{_LEFT}" y1="{base}" x2="{_WIDTH - 20}" y2="{base}" stroke="black"/>',
        f'<text x="{_LEFT - 8}" y="{_TOP + 4}" text-anchor="end">{most:,}</text>',
        f'<text x="{_LEFT - 8}" y="{base}" text-anchor="end">0</text>',
    ]
    for number, entry in enumerate(histogram):
        x, middle = _LEFT + step * number, _LEFT + step * (number + 0.5)
        height = room * entry["documents"] / most
        parts += [
            f'<rect x="{x + 0.1 * step:.1f}" y="{base - height:.1f}" width="{0.8 * step:.1f}" height="{height:.1f}" '
            f'fill="#4878a8"><title>{entry["from"]:,} to {entry["to"]:,}: {entry["documents"]:,}</title></rect>',
            f'<text x="{middle:.1f}" y="{base - height - 4:.1f}" text-anchor="middle">'
            f"{entry['documents'] / total:.1%}</text>",
            f'<text x="{middle:.1f}" y="{base + 16}" text-anchor="middle">{_short(entry["from"])}+</text>',
        ]
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 10}" text-anchor="middle">tokens of a document, from</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _short(number: int) -> str:
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if number >= size:
            return f"{number // size}{unit}"
    return str(number)
