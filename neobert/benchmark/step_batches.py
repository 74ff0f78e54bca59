"""Batches for the step benchmarks: documents, packed or one to a row, masked and collated as in training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neobert.data.rows.collate import Collator
from neobert.data.rows.packing import best_fit, max_segments_per_row
from neobert.objectives.masking import MaskPolicy
from neobert.types import PackedBatch, PackedRow

Tokens = NDArray[np.int32]

SPECIALS = 5
"""Tokens of a made-up vocabulary that are never drawn: [PAD], [UNK], [CLS], [SEP], [MASK]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowShape:
    """What a batch looks like."""

    rows: int
    length: int
    packed: bool
    """False: one document to a row, the rest of it padding."""


def made_up_policy(vocab_size: int, probability: float) -> MaskPolicy:
    """Masks over a vocabulary without meaning."""
    return MaskPolicy(
        probability=probability,
        mask_all=False,
        mask_token_id=4,
        special_ids=tuple(range(SPECIALS)),
        random_ids=np.arange(SPECIALS, vocab_size, dtype=np.int32),
    )


def make_documents(num_tokens: int, *, mean: float, longest: int, vocab_size: int) -> list[Tokens]:
    """Documents of random tokens whose lengths are log-normal around `mean`, at least `num_tokens` in all.

    Equal for equal arguments.
    """
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(mean) - 0.5, 1.0, size=4 + num_tokens // 8)).astype(int)
    lengths = np.clip(lengths, 8, longest - 2)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), num_tokens)) + 1]
    wrapped = (np.concatenate([[2], rng.integers(SPECIALS, vocab_size, n), [3]]) for n in lengths)
    return [document.astype(np.int32) for document in wrapped]


def make_batches(
    documents: Sequence[Tokens], shape: RowShape, policy: MaskPolicy, pad_id: int = 0
) -> list[PackedBatch]:
    """Full batches of these documents, in an order that does not follow their lengths; what is left over is dropped."""
    most = max_segments_per_row(shape.length, packed=shape.packed)
    plan: Sequence[Sequence[int]] = [[number] for number in range(len(documents))]
    if shape.packed:
        plan = best_fit([len(document) for document in documents], shape.length, most)
        plan = [plan[n] for n in np.random.default_rng(0).permutation(len(plan))]
    collate = Collator(policy=policy, seed=0, draw="row", max_seq_length=shape.length, max_segments=most, pad_id=pad_id)
    rows = [_make_row([documents[number] for number in numbers], key) for key, numbers in enumerate(plan)]
    whole = len(rows) // shape.rows * shape.rows
    return [collate(rows[at : at + shape.rows]) for at in range(0, whole, shape.rows)]


def _make_row(documents: Sequence[Tokens], key: int) -> PackedRow:
    count = len(documents)
    return PackedRow(
        tokens=np.concatenate(documents),
        lengths=tuple(len(document) for document in documents),
        documents=(0,) * count,
        offsets=(0,) * count,
        sources=(0,) * count,
        key=key,
    )
