"""The texts of several rows side by side in one row of slots: what fine-tuning computes at once, nothing padded.

The row is filled up to a multiple of 64 slots, so that libraries which keep code for each shape meet fewer of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from neobert.data.rows.collate import Collator, join_rows
from neobert.data.rows.lanes import IntArray
from neobert.data.rows.order import extend_keys, mask_hashes
from neobert.splitmix import Hashes, mix
from neobert.types import Corruption, PackedBatch, PackedRow

SLOTS_MULTIPLE = 64


class NoMasks:
    """The mask policy of texts that are read as they are."""

    is_causal = False

    def corrupt(
        self, tokens: IntArray, hashes: Hashes, offset: float, *, step: int
    ) -> tuple[IntArray, NDArray[np.int64]]:
        return tokens, np.empty(0, dtype=np.int64)

    def max_targets(self, num_slots: int) -> int:
        return 0


NO_MASKS = NoMasks()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SideBySide:
    """Rows -> one batch of one row; a pure function of the rows and of these settings."""

    max_seq_length: int
    """Tokens of the longest text."""

    pad_id: int
    policy: Corruption = NO_MASKS
    seed: int = 0
    """Of the masks."""

    num_sources: int = 1

    def __call__(self, rows: Sequence[PackedRow]) -> PackedBatch:
        joined = join_rows(rows)
        collate = Collator(
            policy=self.policy,
            seed=self.seed,
            draw="document",
            max_seq_length=2**31 - SLOTS_MULTIPLE,
            max_segments=len(joined.lengths),
            pad_id=self.pad_id,
            pad_to_multiple_of=SLOTS_MULTIPLE,
            num_sources=self.num_sources,
        )
        batch = collate([joined])
        longest = max(self.max_seq_length, SLOTS_MULTIPLE)
        return replace(batch, segments=replace(batch.segments, max_seqlen=longest))


def digest_rows(rows: Sequence[PackedRow]) -> int:
    """Sum over rows of one 64-bit hash of (row number; token and number of its text in every slot), modulo 2**64."""
    total = 0
    for row in rows:
        numbers = np.repeat(np.arange(1, len(row.lengths) + 1, dtype=np.uint64), row.lengths)
        packed = row.tokens.astype(np.uint64) | (numbers << np.uint64(24))
        sums = mask_hashes(packed, np.arange(len(packed))).sum(dtype=np.uint64)
        total += int(extend_keys(mix(np.array([sums])), [row.key])[0])
    return total % 2**64
