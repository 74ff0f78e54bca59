from dataclasses import replace

import numpy as np
import pytest
import torch

from neobert.data.rows.collate import TARGETS_MULTIPLE, Collator, build_row, join_rows
from neobert.data.rows.lanes import Window
from neobert.data.rows.packing import Piece
from neobert.types import IGNORE_INDEX, PackedRow

CLS, SEP, PAD = 2, 3, 0


def make_row(*lengths, key=0, documents=None, offsets=None, start=10):
    """A row of segments with these lengths (specials included) and ascending tokens."""
    tokens = []
    for length in lengths:
        tokens += [CLS, *range(start, start + length - 2), SEP]
        start += length - 2
    return PackedRow(
        tokens=np.array(tokens, dtype=np.int32),
        lengths=lengths,
        documents=documents or tuple(range(len(lengths))),
        offsets=offsets or (0,) * len(lengths),
        sources=(0,) * len(lengths),
        key=key,
    )


@pytest.fixture
def collate(policy):
    return Collator(policy=policy, seed=1, draw="row", max_seq_length=11, max_segments=3, pad_id=PAD)


def originals(batch):
    """The tokens of a batch before they were corrupted."""
    ids = batch.input_ids.flatten().clone()
    kept = batch.targets != IGNORE_INDEX
    ids[batch.masked_index[kept]] = batch.targets[kept].int()
    return ids.view(batch.input_ids.shape)


def test_build_row_wraps_every_piece():
    window = Window(
        rows=[],
        get=lambda piece: np.arange(100)[piece.start : piece.start + piece.length],
        documents=np.array([40, 50]),
        sources=np.array([0, 1]),
        next_state={},
    )
    row = build_row([Piece(1, 10, 2), Piece(0, 0, 1)], window, 77, cls_id=CLS, sep_id=SEP)
    assert row.tokens.tolist() == [2, 10, 11, 3, 2, 0, 3]
    assert (row.lengths, row.documents, row.offsets, row.key) == ((4, 3), (50, 40), (10, 0), 77)
    assert row.sources == (1, 0)


def test_layout_literally(collate):
    batch = collate([make_row(5, 4, key=3), make_row(11, key=4)], num_rows=3)
    assert originals(batch).tolist() == [
        [2, 10, 11, 12, 3, 2, 13, 14, 3, 0, 0],
        [2, 10, 11, 12, 13, 14, 15, 16, 17, 18, 3],
        [0] * 11,
    ]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0], list(range(11)), [0] * 11]
    assert batch.segments.ids.tolist() == [[1] * 5 + [2] * 4 + [0] * 2, [1] * 11, [0] * 11]
    assert batch.segments.cu_seqlens.tolist() == [0, 5, 9, 11, 22] + [33] * 8
    assert batch.segments.cu_seqlens.shape == (3 * (3 + 1) + 1,)
    assert torch.equal(batch.segments.cu_seqlens, batch.segments.cu_seqlens_cpu)
    assert batch.segments.max_seqlen == 11
    assert batch.row_keys.tolist() == [3, 4, -1]
    assert (batch.num_tokens, batch.num_documents, batch.source_tokens) == (20, 3, (20,))
    assert batch.attended_tokens == 25 + 16 + 121
    assert batch.input_ids.dtype == batch.positions.dtype == batch.segments.cu_seqlens.dtype == torch.int32
    assert batch.masked_index.dtype == batch.targets.dtype == torch.int64


def test_targets_have_a_constant_size_and_never_hit_special_tokens_or_padding(collate, policy):
    for key in range(50):
        batch = collate([make_row(5, 4, key=key), make_row(11, key=key + 1000)], num_rows=3)
        assert batch.targets.shape == batch.masked_index.shape == (3 * policy.max_targets(11),)
        kept = batch.targets != IGNORE_INDEX
        assert int(kept.sum()) == batch.num_targets
        assert bool((batch.targets[kept] >= 10).all())
        assert bool((batch.input_ids.flatten()[batch.masked_index[kept]] == policy.mask_id).all())
        assert bool((batch.masked_index[~kept] == 0).all())


def test_continued_documents_count_once(collate):
    assert collate([make_row(5, 4, offsets=(0, 30))]).num_documents == 1


def test_no_rows_at_all(collate):
    batch = collate([], num_rows=2)
    assert (batch.num_tokens, batch.num_targets, batch.digest) == (0, 0, 0)
    assert batch.segments.cu_seqlens.tolist() == [0, 11] + [22] * 7


def test_width_follows_the_longest_row_where_asked(collate):
    narrow = replace(collate, pad_to_multiple_of=4)
    assert narrow([make_row(5)]).input_ids.shape == (1, 8)
    assert narrow([make_row(10)]).input_ids.shape == (1, 11)
    assert narrow([make_row(5)]).segments.max_seqlen == 8


def test_masks_depend_on_seed_and_row_key_only(collate):
    def masks(row, seed=1, others=()):
        batch = replace(collate, seed=seed)([*others, row])
        first = len(others) * 11
        return [i - first for i in batch.masked_index[: batch.num_targets].tolist() if i >= first]

    row = make_row(11, key=9)
    assert masks(row) == masks(row, others=[make_row(5, 4)])
    differ = [masks(make_row(11, key=k)) != masks(row) for k in range(20, 40)]
    assert sum(differ) > 15
    assert any(masks(make_row(11, key=k), seed=2) != masks(make_row(11, key=k)) for k in range(5))


def test_number_of_targets_is_unbiased(collate):
    rows = [make_row(8, key=k) for k in range(2000)]
    fraction = sum(collate(rows[i : i + 8]).num_targets for i in range(0, 2000, 8)) / (2000 * 6)
    assert abs(fraction - 0.25) < 0.01


def test_digest_sees_tokens_borders_masks_and_key_but_not_micro_batches(collate):
    rows = [make_row(5, 4, key=3), make_row(11, key=4), make_row(7, key=5)]
    digest = collate(rows).digest
    assert digest == sum(collate([row]).digest for row in rows) % 2**64
    assert digest == replace(collate, pad_to_multiple_of=4)(rows).digest
    moved = replace(rows[0], lengths=(4, 5))
    assert collate([moved]).digest != collate([rows[0]]).digest
    assert collate([replace(rows[0], key=8)]).digest != collate([rows[0]]).digest
    edited = replace(rows[0], tokens=np.where(rows[0].tokens == 12, 99, rows[0].tokens).astype(np.int32))
    assert collate([edited]).digest != collate([rows[0]]).digest
    assert replace(collate, seed=2)(rows).digest != digest


def test_evaluation_masks_do_not_depend_on_packing(policy):
    """A document's targets are the same alone, packed, and after others in another row."""
    collate = Collator(policy=policy, seed=1, draw="document", max_seq_length=40, max_segments=5, pad_id=PAD)

    def targets(batch, start, end):
        kept = batch.targets != IGNORE_INDEX
        index = batch.masked_index[kept]
        inside = (index >= start) & (index < end)
        return list(zip((index[inside] - start).tolist(), batch.targets[kept][inside].tolist()))

    for document in range(30):
        row = make_row(12, documents=(document,), key=0)
        alone = targets(collate([row]), 0, 12)
        joined = join_rows([make_row(9, documents=(500,), key=5), row])
        assert targets(collate([make_row(40, documents=(600,)), joined]), 49, 61) == alone
    first = make_row(12, documents=(1,), offsets=(0,))
    later = make_row(12, documents=(1,), offsets=(10,))
    others = make_row(12, documents=(2,), offsets=(0,))
    assert len({tuple(targets(collate([row]), 0, 12)) for row in (first, later, others)}) == 3


def test_evaluation_targets_are_padded_to_a_multiple(policy):
    collate = Collator(policy=policy, seed=1, draw="document", max_seq_length=40, max_segments=5, pad_id=PAD)
    assert collate([make_row(40)]).targets.shape == (TARGETS_MULTIPLE,)
    assert collate([make_row(40, key=k) for k in range(40)]).targets.shape == (2 * TARGETS_MULTIPLE,)
