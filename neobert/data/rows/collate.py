"""Rows of documents become one micro-batch of tensors.

Layout of a row of S slots that holds documents a (3 tokens) and b (2 tokens), S = 11:

    input_ids   [CLS] a0 a1 a2 [SEP] [CLS] b0 b1 [SEP] [PAD] [PAD]
    positions     0    1  2  3   4     0    1  2   3     0     0
    segments.ids  1    1  1  1   1     2    2  2   2     0     0
    cu_seqlens    0                    5                 9            (the padding is a segment of its own)

Which tokens are predicted is decided here, on the host, with counter-based random hashes, so that the training step
meets no shape that depends on the content.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from neobert.data.rows.lanes import IntArray, Window
from neobert.data.rows.order import extend_keys, key, mask_hashes, uniforms
from neobert.data.rows.packing import SPECIALS_PER_SEGMENT, Piece
from neobert.model.segments import Segments
from neobert.splitmix import mix
from neobert.types import IGNORE_INDEX, Corruption, PackedBatch, PackedRow

TARGETS_MULTIPLE = 256
"""Where the number of targets varies, the arrays of them grow in steps of this."""


def bound_segments(longest: Sequence[int | None], max_seq_length: int) -> int:
    """`Collator.max_segment_length` for sources whose longest documents have so many tokens (None: unknown): a power of
    two that has room for [CLS] and [SEP] too, or the length of a row."""
    slots = [max_seq_length if tokens is None else tokens + SPECIALS_PER_SEGMENT for tokens in longest]
    return min(max_seq_length, 1 << (max(slots) - 1).bit_length())


def build_row(pieces: Sequence[Piece], window: Window, row_key: int, *, cls_id: int, sep_id: int) -> PackedRow:
    """Fetches the tokens of a planned row and wraps every piece as `[CLS] ... [SEP]`."""
    lengths = tuple(piece.length + SPECIALS_PER_SEGMENT for piece in pieces)
    tokens = np.empty(sum(lengths), dtype=np.int32)
    end = 0
    for piece, length in zip(pieces, lengths):
        start, end = end, end + length
        tokens[start] = cls_id
        tokens[start + 1 : end - 1] = window.get(piece)
        tokens[end - 1] = sep_id
    return PackedRow(
        tokens=tokens,
        lengths=lengths,
        documents=tuple(int(window.documents[piece.document]) for piece in pieces),
        offsets=tuple(piece.start for piece in pieces),
        sources=tuple(int(window.sources[piece.document]) for piece in pieces),
        key=row_key,
    )


def join_rows(rows: Sequence[PackedRow]) -> PackedRow:
    """Rows side by side in one; it takes the key of the first."""
    return PackedRow(
        tokens=np.concatenate([row.tokens for row in rows]),
        lengths=sum((row.lengths for row in rows), ()),
        documents=sum((row.documents for row in rows), ()),
        offsets=sum((row.offsets for row in rows), ()),
        sources=sum((row.sources for row in rows), ()),
        key=rows[0].key,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Where the real tokens of a batch are; `n` tokens of `k` segments in row order."""

    tokens: IntArray
    """`[n]`"""

    lengths: NDArray[np.int64]
    """`[k]` tokens of each segment."""

    starts: NDArray[np.int64]
    """`[k]` first token of each segment among the n."""

    row_of: NDArray[np.int64]
    """`[n]` row of each token."""

    row_starts: NDArray[np.int64]
    """`[rows]` first token of each row among the n."""

    row_lengths: NDArray[np.int64]
    """`[rows]`"""

    positions: NDArray[np.int64]
    """`[n]` position of each token in its segment."""

    numbers: NDArray[np.int64]
    """`[n]` number of each token's segment within its row, from 1."""

    @property
    def slots(self) -> NDArray[np.int64]:
        """`[n]` slot of each token within its row."""
        return np.arange(len(self.tokens)) - self.row_starts[self.row_of]


def _layout(rows: Sequence[PackedRow]) -> _Layout:
    lengths = np.array([length for row in rows for length in row.lengths], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    row_lengths = np.array([len(row.tokens) for row in rows], dtype=np.int64)
    numbers = np.array([number for row in rows for number in range(1, len(row.lengths) + 1)], dtype=np.int64)
    tokens = np.concatenate([row.tokens for row in rows]) if rows else np.empty(0, dtype=np.int32)
    return _Layout(
        tokens=tokens,
        lengths=lengths,
        starts=starts,
        row_of=np.repeat(np.arange(len(rows)), row_lengths),
        row_starts=np.cumsum(row_lengths) - row_lengths,
        row_lengths=row_lengths,
        positions=np.arange(len(tokens)) - np.repeat(starts, lengths),
        numbers=np.repeat(numbers, lengths),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Collator:
    """Turns rows into a `PackedBatch`; a pure function of the rows and of these settings."""

    policy: Corruption
    seed: int
    draw: Literal["row", "document"]
    """What one draw of masks covers. `row`, for training: keyed by (seed, row key, slot), and the number of targets
    per row is bounded, so that shapes are constant. `document`, for evaluation: keyed by (seed, source, document,
    token), so that neither packing nor batch size nor the number of ranks changes a mask."""

    max_seq_length: int
    max_segments: int
    """Most segments in a row; see `packing.max_segments_per_row`."""

    pad_id: int
    pad_to_multiple_of: int | None = None
    """None: S is always `max_seq_length`. Else S is the longest row rounded up to this multiple."""

    max_segment_length: int | None = None
    """Upper bound of the length of a segment, where it is known to be less than that of a row; see `bound_segments`."""

    num_sources: int = 1
    varying_targets: bool = False
    """With `draw: row`: not the bound of targets, but the entries that a batch needs, in steps of TARGETS_MULTIPLE. It
    is for rows that draw rates: their bound is several times their mean, and every entry costs a projection. With
    `draw: document` it is always so."""

    first_policy: Corruption | None = None
    """What is predicted in the first `first_steps` steps instead of what `policy` says."""

    first_steps: int = 0

    def __call__(self, rows: Sequence[PackedRow], num_rows: int | None = None, *, step: int = 0) -> PackedBatch:
        """A batch of `num_rows` rows (default: as many as are passed) as they are masked at a step of training; further
        rows are all padding."""
        num_rows = len(rows) if num_rows is None else num_rows
        policy = self.policy if self.first_policy is None or step >= self.first_steps else self.first_policy
        layout = _layout(rows)
        width = self._choose_width(layout.row_lengths)
        flat = layout.row_of * width + layout.slots
        corrupted, selected = self._corrupt(policy, rows, layout, step)
        predicted = layout.tokens[selected + 1 if policy.is_causal else selected]

        input_ids = np.full(num_rows * width, self.pad_id, dtype=np.int32)
        input_ids[flat] = corrupted
        positions = np.zeros(num_rows * width, dtype=np.int32)
        positions[flat] = layout.positions
        segment_ids = np.zeros(num_rows * width, dtype=np.int32)
        segment_ids[flat] = layout.numbers
        masked_index, targets = self._targets(policy, num_rows, width, flat[selected], predicted)
        row_keys = np.full(num_rows, -1, dtype=np.int64)
        row_keys[: len(rows)] = [row.key for row in rows]
        borders = torch.from_numpy(self._borders(layout, num_rows, width))
        shape = (num_rows, width)
        return PackedBatch(
            input_ids=torch.from_numpy(input_ids).view(shape),
            positions=torch.from_numpy(positions).view(shape),
            segments=Segments(
                ids=torch.from_numpy(segment_ids).view(shape),
                cu_seqlens=borders,
                cu_seqlens_cpu=borders,
                max_seqlen=self._longest(width),
                causal=policy.is_causal,
            ),
            masked_index=torch.from_numpy(masked_index),
            targets=torch.from_numpy(targets),
            row_keys=torch.from_numpy(row_keys),
            source_tokens=self._source_tokens(rows, layout),
            num_tokens=len(layout.tokens),
            num_targets=len(selected),
            num_documents=sum(offset == 0 for row in rows for offset in row.offsets),
            attended_tokens=_count_attended(layout.lengths, causal=policy.is_causal),
            digest=_digest(layout, corrupted, selected, predicted, row_keys[: len(rows)]),
        )

    def _longest(self, width: int) -> int:
        return min(width, self.max_segment_length or width)

    def _choose_width(self, row_lengths: NDArray[np.int64]) -> int:
        if self.pad_to_multiple_of is None:
            return self.max_seq_length
        longest = max(1, int(row_lengths.max(initial=1)))
        return min(self.max_seq_length, -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of)

    def _corrupt(
        self, policy: Corruption, rows: Sequence[PackedRow], layout: _Layout, step: int
    ) -> tuple[IntArray, NDArray[np.int64]]:
        """The corrupted tokens, and the indices of those that predict among the n tokens, ascending."""
        if self.draw == "row":
            starts, row_keys = layout.row_starts, [row.key for row in rows]
            keys = extend_keys(key(self.seed, "masks"), row_keys)
            offsets = uniforms(extend_keys(key(self.seed, "mask_count"), row_keys))
            hashes = mask_hashes(keys[layout.row_of], layout.slots)
        else:
            starts = layout.starts
            documents = np.array([d for row in rows for d in row.documents], dtype=np.int64)
            sources = np.array([s for row in rows for s in row.sources], dtype=np.int64)
            firsts = np.array([o for row in rows for o in row.offsets], dtype=np.int64)
            keys = extend_keys(extend_keys(key(self.seed, "masks"), sources), documents)
            counts = extend_keys(extend_keys(key(self.seed, "mask_count"), sources), documents)
            offsets = uniforms(extend_keys(counts, firsts))
            hashes = mask_hashes(np.repeat(keys, layout.lengths), np.repeat(firsts, layout.lengths) + layout.positions)
        corrupted = layout.tokens.copy()
        selected = [np.empty(0, dtype=np.int64)]
        ends = [*starts[1:].tolist(), len(corrupted)]
        for start, end, offset in zip(starts.tolist(), ends, offsets.tolist()):
            draw = layout.tokens[start:end], hashes[start:end], offset
            corrupted[start:end], indices = policy.corrupt(*draw, step=step)
            selected.append(indices + start)
        return corrupted, np.concatenate(selected)

    def _targets(
        self, policy: Corruption, num_rows: int, width: int, slots: NDArray[np.int64], tokens: IntArray
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        size = max(1, -(-len(slots) // TARGETS_MULTIPLE)) * TARGETS_MULTIPLE
        if self.draw == "row":
            bound = num_rows * policy.max_targets(width)
            size = min(size, bound) if self.varying_targets else bound
        masked_index = np.zeros(size, dtype=np.int64)
        targets = np.full(size, IGNORE_INDEX, dtype=np.int64)
        masked_index[: len(slots)] = slots
        targets[: len(slots)] = tokens
        return masked_index, targets

    def _borders(self, layout: _Layout, num_rows: int, width: int) -> IntArray:
        """Borders of segments and paddings in the `num_rows * width` slots, filled up to a constant length. A padding
        that is longer than any segment may be is cut into several."""
        real = np.zeros(num_rows, dtype=np.int64)
        real[: len(layout.row_lengths)] = layout.row_lengths
        longest = self._longest(width)
        row_starts = np.arange(num_rows) * width
        first_rows = layout.row_of[layout.starts]
        segments = first_rows * width + layout.starts - layout.row_starts[first_rows]
        most_paddings = -(-width // longest)
        cuts = real[:, None] + np.arange(most_paddings) * longest
        paddings = (row_starts[:, None] + cuts)[cuts < width]
        borders = np.full(num_rows * (self.max_segments + most_paddings) + 1, num_rows * width, dtype=np.int32)
        found = np.sort(np.concatenate([segments, paddings]))
        borders[: len(found)] = found
        return borders

    def _source_tokens(self, rows: Sequence[PackedRow], layout: _Layout) -> tuple[int, ...]:
        sources = np.array([s for row in rows for s in row.sources], dtype=np.int64)
        return tuple(np.bincount(sources, weights=layout.lengths, minlength=self.num_sources).astype(int).tolist())


def _count_attended(lengths: NDArray[np.int64], *, causal: bool) -> int:
    """Keys that all tokens of segments see."""
    return int((lengths * (lengths + 1) // 2 if causal else np.square(lengths)).sum())


def _digest(
    layout: _Layout,
    corrupted: IntArray,
    selected: NDArray[np.int64],
    predicted: IntArray,
    row_keys: NDArray[np.int64],
) -> int:
    """Sum over rows of one 64-bit hash of (row key; for each slot: token, segment number, target), modulo 2**64.

    Padding does not count, so the digest of a step is the same however its rows are cut into micro-batches.
    """
    if not len(row_keys):
        return 0
    labels = np.zeros(len(corrupted), dtype=np.uint64)
    labels[selected] = predicted.astype(np.uint64) + np.uint64(1)
    numbers = layout.numbers.astype(np.uint64)
    packed = corrupted.astype(np.uint64) | (numbers << np.uint64(24)) | (labels << np.uint64(40))
    sums = np.add.reduceat(mask_hashes(packed, layout.slots), layout.row_starts)
    return int(extend_keys(mix(sums), row_keys).sum(dtype=np.uint64))
