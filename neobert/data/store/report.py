"""What a tokenised folder holds: lengths, unknown tokens and duplicates, as numbers, as text and as a picture.

One pass over the tokens, batch by batch. Memory: one batch, 8 bytes for each document (its hash), and the number of
documents of each length that occurs, from which every percentile follows exactly.

The hash of a document is the sum over its tokens of mix(token + position * gamma) modulo 2**64, where mix is the
finaliser of splitmix64: it depends on the order, and a document cut into pieces has the hash of the whole.

A histogram of lengths as an SVG picture, written by hand.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neobert.data.rows.packing import SPECIALS_PER_SEGMENT
from neobert.data.store.arrow import load_table, read_manifest
from neobert.errors import DataError
from neobert.splitmix import GAMMA, Hashes, mix

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 720, 320, 70, 40, 50


def draw_lengths(histogram: Sequence[dict[str, int]], title: str) -> str:
    """One bar for each `{"from", "to", "documents"}`, with the fraction of the documents above it."""
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


_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_ROW_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
_BAR = 40


class Report(NamedTuple):
    """A written report."""

    values: dict[str, Any]
    text: str


class _Rows(NamedTuple):
    """Rows of a record batch without their special tokens."""

    tokens: NDArray[Any]
    """All of them, one after the other."""

    lengths: NDArray[np.int64]
    documents: NDArray[np.int64]
    """Number of the document that each row belongs to; only whether neighbours are equal counts."""


@dataclass(kw_only=True, slots=True)
class _Statistics:
    """What is known of the documents that are complete."""

    lengths: Counter[int] = field(default_factory=Counter)
    hashes: list[Hashes] = field(default_factory=list)
    num_unknown: int | None = 0
    open_document: int | None = None
    """The document of the last row, which may continue in the next batch."""

    open_length: int = 0
    open_hash: int = 0


def list_folders(output: Path) -> list[Path]:
    """The tokenised folders in `output`: its splits where it has any, else itself."""
    names = output / "dataset_dict.json"
    return [output / name for name in json.loads(names.read_text())["splits"]] if names.is_file() else [output]


def write_report(folder: Path, max_length: int | None = None) -> Report:
    """Measures a folder and writes `report.json` and `report.svg` into it.

    Args:
        max_length: a row length of interest, special tokens included, beside the usual ones.

    Raises:
        DataError: it is no folder of tokens.
    """
    if not (folder / "state.json").is_file():
        raise DataError(f"{folder} holds no tokenised data to report on; name --dataset and --tokenizer to make it")
    table = load_table(folder)
    if "input_ids" not in table.column_names:
        raise DataError(f"{folder} has no column input_ids (columns: {', '.join(table.column_names)})")
    manifest = read_manifest(folder) or {}
    special_ids: dict[str, int | None] = manifest.get("special_ids", {})
    statistics = _Statistics(num_unknown=None if special_ids.get("unk") is None else 0)
    around = (special_ids.get("cls"), special_ids.get("sep")) if manifest.get("special_tokens") else (None, None)
    for rows in _read_rows(table, *around):
        _add(statistics, rows, special_ids.get("unk"))
    _close(statistics)
    values = _summarise(statistics, max_length)
    text = _write_text(values, folder)
    (folder / "report.json").write_text(json.dumps(values, indent=2) + "\n")
    (folder / "report.svg").write_text(draw_lengths(values["histogram"], f"Tokens per document: {folder.name}"))
    return Report(values, text)


def _read_rows(table: pa.Table, cls_id: int | None, sep_id: int | None) -> Iterator[_Rows]:
    first = 0
    for batch in table.to_batches():
        column = batch.column("input_ids")
        offsets, tokens = _offsets(column), column.values.to_numpy(zero_copy_only=True)
        starts, ends = offsets[:-1].copy(), offsets[1:].copy()
        if cls_id is not None and len(tokens):
            filled = starts < ends
            starts[filled] += tokens[starts[filled]] == cls_id
            filled = starts < ends
            ends[filled] -= tokens[ends[filled] - 1] == sep_id
        kept = np.zeros(len(tokens) + 1, dtype=np.int8)
        np.add.at(kept, starts, 1)
        np.add.at(kept, ends, -1)
        numbers = batch.column("document").to_numpy() if "document" in table.column_names else np.arange(len(batch))
        yield _Rows(
            tokens[np.cumsum(kept[:-1], dtype=np.int8).astype(bool)],
            (ends - starts).astype(np.int64),
            numbers if "document" in table.column_names else numbers + first,
        )
        first += len(batch)


def _offsets(column: pa.Array) -> NDArray[np.int64]:
    if pa.types.is_fixed_size_list(column.type):
        return (np.arange(len(column) + 1) + column.offset) * column.type.list_size
    found: NDArray[np.int64] = column.offsets.to_numpy(zero_copy_only=True).astype(np.int64)
    return found


def _add(statistics: _Statistics, rows: _Rows, unk_id: int | None) -> None:
    """Adds a batch; the document of its last row stays open."""
    if not len(rows.lengths):
        return
    if statistics.num_unknown is not None:
        statistics.num_unknown += int((rows.tokens == unk_id).sum())
    if statistics.open_document != int(rows.documents[0]):
        _close(statistics)
    firsts = np.flatnonzero(np.r_[True, rows.documents[1:] != rows.documents[:-1]])
    lengths = np.add.reduceat(rows.lengths, firsts)
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(len(rows.tokens)) - np.repeat(starts, lengths)
    positions[: lengths[0]] += statistics.open_length
    with np.errstate(over="ignore"):
        mixed = mix(rows.tokens.astype(np.uint64) + positions.astype(np.uint64) * np.uint64(GAMMA))
        sums = np.r_[np.uint64(0), np.cumsum(mixed, dtype=np.uint64)]
        hashes = sums[starts + lengths] - sums[starts]
        hashes[0] += np.uint64(statistics.open_hash)
    lengths[0] += statistics.open_length
    sizes, counts = np.unique(lengths[:-1], return_counts=True)
    statistics.lengths.update(dict(zip(sizes.tolist(), counts.tolist())))
    statistics.hashes.append(hashes[:-1])
    statistics.open_document = int(rows.documents[-1])
    statistics.open_length, statistics.open_hash = int(lengths[-1]), int(hashes[-1])


def _close(statistics: _Statistics) -> None:
    if statistics.open_document is not None:
        statistics.lengths[statistics.open_length] += 1
        statistics.hashes.append(np.array([statistics.open_hash], dtype=np.uint64))
    statistics.open_document, statistics.open_length, statistics.open_hash = None, 0, 0


def _summarise(statistics: _Statistics, max_length: int | None) -> dict[str, Any]:
    sizes = np.array(sorted(statistics.lengths), dtype=np.int64)
    counts = np.array([statistics.lengths[size] for size in sizes.tolist()], dtype=np.int64)
    num_documents, num_tokens = int(counts.sum()), int((sizes * counts).sum())
    if not num_documents:
        raise DataError("there are no documents to report on")
    hashes = np.concatenate(statistics.hashes)
    hashes.sort()
    num_duplicates = int((hashes[1:] == hashes[:-1]).sum())
    ends = np.cumsum(counts)
    unknown = statistics.num_unknown
    row_lengths = sorted({*_ROW_LENGTHS, *([] if max_length is None else [max_length])})
    return {
        "num_documents": num_documents,
        "num_tokens": num_tokens,
        "mean": num_tokens / num_documents,
        "shortest": int(sizes[0]),
        "longest": int(sizes[-1]),
        "percentiles": {
            str(p): int(sizes[np.searchsorted(ends, max(1, -(-p * num_documents // 100)))]) for p in _PERCENTILES
        },
        "unknown_tokens": unknown,
        "unknown_share": None if unknown is None else unknown / max(1, num_tokens),
        "duplicates": num_duplicates,
        "duplicate_share": num_duplicates / num_documents,
        "longer_than_row": {
            str(row): int(counts[sizes > row - SPECIALS_PER_SEGMENT].sum()) / num_documents for row in row_lengths
        },
        "histogram": _histogram(sizes, counts),
    }


def _histogram(sizes: NDArray[np.int64], counts: NDArray[np.int64]) -> list[dict[str, int]]:
    """Documents by length in bins that double: 0, 1, 2-3, 4-7, ..."""
    bins: Counter[int] = Counter()
    for size, count in zip(sizes.tolist(), counts.tolist()):
        bins[size.bit_length()] += count
    return [{"from": (1 << n) >> 1, "to": (1 << n) - 1, "documents": bins[n]} for n in range(min(bins), max(bins) + 1)]


def _write_text(values: dict[str, Any], folder: Path) -> str:
    most = max(entry["documents"] for entry in values["histogram"])
    unknown = values["unknown_share"]
    lines = [
        f"{folder}: {values['num_documents']:,} documents, {values['num_tokens']:,} tokens"
        + ("" if unknown is None else " without special ones"),
        f"tokens a document: mean {values['mean']:,.1f}, shortest {values['shortest']:,}, longest "
        f"{values['longest']:,}; percentiles "
        + ", ".join(f"{name}%: {value:,}" for name, value in values["percentiles"].items()),
        "unknown tokens: " + ("not known, there is no manifest" if unknown is None else f"{unknown:.4%}"),
        f"duplicates of another document: {values['duplicates']:,} ({values['duplicate_share']:.2%})",
        "documents that do not fit into a row of "
        + ", ".join(f"{row}: {fraction:.1%}" for row, fraction in values["longer_than_row"].items()),
    ]
    for entry in values["histogram"]:
        bar = "#" * -(-_BAR * entry["documents"] // most)
        lines.append(f"{entry['from']:>9,} to {entry['to']:>9,}  {entry['documents']:>12,}  {bar}")
    return "\n".join([*lines, f"written to {folder / 'report.json'} and report.svg"])
