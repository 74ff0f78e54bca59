"""The mask policy: exact counts, rates, what is never masked, purity."""

from typing import Any

import numpy as np
import pytest

from neobert.objectives.masking import MaskPolicy

CLS, SEP, MASK, PAD = 1, 2, 3, 0
SPECIALS = (PAD, CLS, SEP, MASK)
VOCAB = 1000


def policy(**changes: Any) -> MaskPolicy:
    values: dict[str, Any] = {
        "probability": 0.2,
        "mask_all": False,
        "mask_token_id": MASK,
        "special_ids": SPECIALS,
        "random_ids": np.arange(4, VOCAB, dtype=np.int32),
    }
    return MaskPolicy(**{**values, **changes})


def row(rng: np.random.Generator, length: int = 126) -> np.ndarray:
    tokens = rng.integers(4, VOCAB, size=length + 2, dtype=np.int32)
    tokens[0], tokens[-1] = CLS, SEP
    return tokens


def words(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.integers(0, 2**64, size=size, dtype=np.uint64)


@pytest.mark.parametrize("offset", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("length", [0, 1, 3, 126, 500])
def test_the_count_is_exact(length: int, offset: float) -> None:
    rng = np.random.default_rng(length)
    tokens = row(rng, length)
    corrupted, selected = policy().corrupt(tokens, words(rng, len(tokens)), offset)
    assert len(selected) == int(0.2 * length + offset)
    assert len(selected) <= policy().max_targets(len(tokens))
    assert selected.dtype == np.int64
    assert corrupted.dtype == np.int32
    assert (np.diff(selected) > 0).all()


def test_the_smallest_hashes_are_selected() -> None:
    tokens = np.array([CLS, 10, 11, 12, 13, 14, SEP], dtype=np.int32)
    order = np.array([0, 9, 2, 8, 1, 7, 3], dtype=np.uint64)  # [CLS] and [SEP] have small words and are skipped
    _, selected = policy(probability=0.4).corrupt(tokens, order, 0.0)
    assert selected.tolist() == [2, 4]


def test_short_rows_are_unbiased() -> None:
    rng = np.random.default_rng(0)
    tokens = row(rng, 3)
    counts = [len(policy().corrupt(tokens, words(rng, 5), offset)[1]) for offset in rng.random(4000)]
    assert np.mean(counts) == pytest.approx(0.6, abs=0.03)


def test_eighty_ten_ten_over_many_rows() -> None:
    rng = np.random.default_rng(1)
    masked = unchanged = drawn = total = 0
    replacements = []
    for _ in range(1000):
        tokens = row(rng)
        corrupted, selected = policy().corrupt(tokens, words(rng, len(tokens)), rng.random())
        untouched = np.setdiff1d(np.arange(len(tokens)), selected)
        assert (corrupted[untouched] == tokens[untouched]).all()
        assert not np.isin(tokens[selected], SPECIALS).any()
        now, before = corrupted[selected], tokens[selected]
        other = (now != MASK) & (now != before)
        masked, unchanged, drawn = masked + (now == MASK).sum(), unchanged + (now == before).sum(), drawn + other.sum()
        total += len(selected)
        replacements.append(now[other])
    assert total == pytest.approx(0.2 * 126 * 1000, rel=0.002)
    assert masked / total == pytest.approx(0.8, abs=0.01)
    assert unchanged / total == pytest.approx(0.1, abs=0.01)
    assert drawn / total == pytest.approx(0.1, abs=0.01)
    everything = np.concatenate(replacements)
    assert not np.isin(everything, SPECIALS).any()
    assert everything.mean() == pytest.approx((4 + VOCAB - 1) / 2, rel=0.03)
    assert everything.min() < 20
    assert everything.max() > VOCAB - 20


def test_every_position_is_as_likely() -> None:
    rng = np.random.default_rng(2)
    tokens = row(rng, 20)
    counts = np.zeros(22)
    for _ in range(5000):
        counts[policy().corrupt(tokens, words(rng, 22), rng.random())[1]] += 1
    assert counts[[0, 21]].sum() == 0
    assert counts[1:21] / 5000 == pytest.approx(np.full(20, 0.2), abs=0.03)


def test_special_tokens_inside_a_document_are_never_masked() -> None:
    rng = np.random.default_rng(3)
    tokens = row(rng)
    tokens[5:60:5] = SEP
    tokens[7:60:5] = MASK
    _, selected = policy(probability=1.0).corrupt(tokens, words(rng, len(tokens)), 0.999)
    assert not np.isin(tokens[selected], SPECIALS).any()
    assert len(selected) == (~np.isin(tokens, SPECIALS)).sum()


def test_mask_all() -> None:
    rng = np.random.default_rng(4)
    tokens = row(rng)
    corrupted, selected = policy(mask_all=True).corrupt(tokens, words(rng, len(tokens)), 0.5)
    assert (corrupted[selected] == MASK).all()
    assert (corrupted == MASK).sum() == len(selected) == 25


def test_pure() -> None:
    rng = np.random.default_rng(5)
    tokens, draw = row(rng), words(rng, 128)
    tokens.flags.writeable = draw.flags.writeable = False
    first, second = (policy().corrupt(tokens, draw, 0.5) for _ in range(2))
    assert (first[0] == second[0]).all()
    assert (first[1] == second[1]).all()


def test_golden() -> None:
    """Integers only: the same on every machine and library version."""
    tokens = np.arange(100, 130, dtype=np.int32)
    draw = np.arange(1, 31, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    _, selected = policy(probability=0.5).corrupt(tokens, draw, 0.0)
    assert selected.tolist() == [1, 3, 4, 6, 9, 11, 12, 14, 16, 17, 19, 22, 24, 25, 27]
    corrupted, _ = policy(probability=1.0).corrupt(tokens, draw, 0.0)
    assert corrupted.tolist() == [
        3,
        3,
        102,
        3,
        3,
        3,
        3,
        3,
        108,
        3,
        3,
        3,
        3,
        3,
        3,
        3,
        3,
        3,
        355,
        66,
        3,
        121,
        3,
        958,
        3,
        3,
        3,
        3,
        128,
        129,
    ]


def test_settings_that_make_no_mask() -> None:
    with pytest.raises(ValueError, match=r"datacollator\.mlm_probability: 20 is outside \(0, 1\]"):
        policy(probability=20)
    with pytest.raises(ValueError, match=r"datacollator\.mask_all: false draws random replacements.*mask_all: true"):
        policy(random_ids=np.array([], dtype=np.int32))
    with pytest.raises(ValueError, match="holds special tokens"):
        policy(random_ids=np.array([3, 4], dtype=np.int32))
