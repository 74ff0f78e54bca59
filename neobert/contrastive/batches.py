"""Rows of a step -> one batch: every text a document of its own, side by side, nothing padded.

A row is a pair with its negatives (or whatever its set holds), its segments are the texts. A process gets all its rows
of a step in one batch, since all of them are compared with each other. They are cut into chunks of
`trainer.per_device_train_batch_size` rows, and only a chunk goes through the encoder at once. The texts of a chunk
are in one row of slots (`SideBySide`):

    chunk 0    [CLS] a0 [SEP] [CLS] p0 [SEP] [CLS] n0 [SEP] [CLS] a1 [SEP] [CLS] p1 [SEP] [PAD]     rows 0 and 1
    texts            0              1              2              3              4
    anchors    0 3        positives   1 4        negatives   2 -        (- : row 1 has none)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from neobert.contrastive.pair_order import TrainSet
from neobert.data.rows.order import key, mask_hashes
from neobert.data.rows.side_by_side import NO_MASKS, SideBySide, digest_rows
from neobert.objectives.pair_batch import Kind, PairBatch
from neobert.splitmix import mix
from neobert.types import Corruption, PackedBatch, PackedRow


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairCollator:
    """Turns the rows of a step into a `PairBatch`; a pure function of the rows and of these settings."""

    sets: Sequence[TrainSet]
    chunk_rows: int
    max_seq_length: int
    pad_id: int
    seed: int
    masks: Corruption
    """Of `mlm`."""

    def __call__(self, rows: Sequence[PackedRow], *, step: int = 0) -> PairBatch:
        """Rows of one set; masks of `mlm` are drawn again for every step."""
        pairs = self.sets[rows[0].sources[0]]
        collate = self._collator(pairs.kind, step)
        parts = [rows[start : start + self.chunk_rows] for start in range(0, len(rows), self.chunk_rows)]
        chunks = tuple(map(collate, parts))
        counts = np.array([len(row.lengths) for row in rows], dtype=np.int64)
        anchors = np.cumsum(counts) - counts
        steps = np.arange(1, pairs.num_negatives + 1)
        negatives = anchors[:, None] + 1 + steps
        has_negative = 1 + steps < counts[:, None]
        return PairBatch(
            kind=pairs.kind,
            chunks=chunks,
            lengths=tuple(torch.tensor([length for row in part for length in row.lengths]) for part in parts),
            anchors=torch.from_numpy(anchors),
            positives=torch.from_numpy(np.where(counts > 1, anchors + 1, anchors)),
            negatives=torch.from_numpy(np.where(has_negative, negatives, 0)),
            has_negative=torch.from_numpy(has_negative),
            text_ids=torch.from_numpy(_text_ids(rows)),
            scores=torch.tensor(self._scores(pairs, rows), dtype=torch.float32),
            row_keys=torch.tensor([row.key for row in rows], dtype=torch.int64),
            source_tokens=tuple(map(sum, zip(*(chunk.source_tokens for chunk in chunks)))),
            num_targets=sum(c.num_targets for c in chunks) if pairs.kind == "mlm" else len(rows),
            digest=self._digest(rows, chunks) if pairs.kind == "mlm" else digest_rows(rows),
        )

    def _collator(self, kind: Kind, step: int) -> SideBySide:
        return SideBySide(
            policy=self.masks if kind == "mlm" else NO_MASKS,
            seed=key(self.seed, "step", step),
            max_seq_length=self.max_seq_length,
            pad_id=self.pad_id,
            num_sources=len(self.sets),
        )

    def _scores(self, pairs: TrainSet, rows: Sequence[PackedRow]) -> list[float]:
        column = {"cosent": "score", "supcon": "label"}.get(pairs.kind)
        if column is None:
            return [0.0] * len(rows)
        return [float(value) for value in pairs.store.column(column, [row.documents[0] for row in rows])]

    def _digest(self, rows: Sequence[PackedRow], chunks: Sequence[PackedBatch]) -> int:
        """Of rows with masks: their targets are drawn from (step, document), whatever the chunks."""
        targets = [int(t) + 1 for chunk in chunks for t in chunk.targets[: chunk.num_targets].tolist()]
        hashed = mix(np.array(targets, dtype=np.uint64)).sum(dtype=np.uint64) if targets else 0
        return (digest_rows(rows) + int(hashed)) % 2**64


def _text_ids(rows: Sequence[PackedRow]) -> NDArray[np.int64]:
    """A 63-bit hash of the tokens of every text."""
    found = []
    for row in rows:
        ends = np.cumsum(row.lengths)
        tokens = row.tokens.astype(np.uint64)
        for start, end in zip(ends - row.lengths, ends):
            found.append(mask_hashes(tokens[start:end], np.arange(end - start)).sum(dtype=np.uint64))
    return (mix(np.array(found, dtype=np.uint64)) >> np.uint64(1)).astype(np.int64)
