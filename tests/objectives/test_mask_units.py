"""Masking by words and by spans, in other mixes and at changing rates."""

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import plain_masks
import pytest

from neobert.objectives import masking
from neobert.objectives.masking import MaskPolicy, span_lengths
from neobert.types import WordEdges

PAD, CLS, SEP, MASK = range(4)
SPECIALS = (PAD, CLS, SEP, MASK)
VOCAB = 300
CONTINUES = np.arange(VOCAB) >= 150
"""Tokens from 150 on continue with the word before them, whatever it is."""

UNITS = ["words", "spans"]


def policy(**changes: Any) -> MaskPolicy:
    values: dict[str, Any] = {
        "probability": 0.3,
        "mask_all": False,
        "mask_token_id": MASK,
        "special_ids": SPECIALS,
        "random_ids": np.arange(4, VOCAB, dtype=np.int32),
        "edges": WordEdges(continues=CONTINUES, is_continued=np.ones(VOCAB, dtype=bool)),
    }
    return MaskPolicy(**{**values, **changes})


def packed_row(rng: np.random.Generator, *lengths: int) -> np.ndarray:
    parts = [[CLS, *rng.integers(4, VOCAB, size=length), SEP] for length in lengths]
    return np.array([token for part in parts for token in part], dtype=np.int32)


def draw(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.integers(0, 2**64, size=size, dtype=np.uint64)


@pytest.mark.parametrize("settings", [{}, {"mask_fraction": 0.5, "random_fraction": 0.5}, {"mask_all": True}])
@pytest.mark.parametrize("probability", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("units", masking.UNITS)
def test_equal_to_the_plain_loops(units: str, probability: float, settings: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    for most in (1, 3, 10):
        masks = policy(units=units, probability=probability, span_max_words=most, **settings)
        for lengths in ([], [0], [1], [0, 1, 2], [40], [3, 60, 7, 1], [5] * 12, [120, 120]):
            tokens = packed_row(rng, *lengths)
            words, offset = draw(rng, len(tokens)), float(rng.random())
            tokens.flags.writeable = words.flags.writeable = False
            corrupted, selected = masks.corrupt(tokens, words, offset)
            wanted = plain_masks.corrupt(masks, tokens.tolist(), words.tolist(), offset)
            assert (corrupted.tolist(), selected.tolist()) == wanted
            maskable = (~np.isin(tokens, SPECIALS)).sum()
            assert (
                len(selected) == min(maskable, int(probability * maskable + offset)) <= masks.max_targets(len(tokens))
            )
            assert (corrupted.dtype, selected.dtype) == (np.int32, np.int64)
            assert not np.isin(tokens[selected], SPECIALS).any()


def test_words_are_whole_but_for_the_last_one() -> None:
    #          CLS  a   ##  b   ##   ##  SEP CLS ##   c  SEP
    tokens = np.array([1, 10, 150, 11, 151, 152, 2, 1, 153, 12, 2], dtype=np.int32)
    order = np.array([0, 40, 1, 20, 2, 3, 0, 0, 30, 10, 0], dtype=np.uint64)  # c, then b, then the piece, then a
    masks = policy(units="words", probability=1.0, mask_all=True)
    expected = [sorted(plain_masks.select(masks, tokens.tolist(), order.tolist(), count)) for count in range(8)]
    assert expected == [
        [],
        [9],
        [3, 9],
        [3, 4, 9],
        [3, 4, 5, 9],
        [3, 4, 5, 8, 9],
        [1, 3, 4, 5, 8, 9],
        [1, 2, 3, 4, 5, 8, 9],
    ]
    for count, indices in enumerate(expected):
        assert (
            policy(units="words", probability=max(count / 7, 1e-9)).corrupt(tokens, order, 0.01)[1].tolist() == indices
        )


def test_words_need_both_tables() -> None:
    edges = WordEdges(continues=CONTINUES, is_continued=np.arange(VOCAB) != 10)
    tokens = np.array([1, 10, 150, 151, 11, 150, 2], dtype=np.int32)
    order = np.array([0, 1, 9, 0, 5, 0, 0], dtype=np.uint64)
    masks = policy(units="words", probability=3 / 5, edges=edges)
    assert masks.corrupt(tokens, order, 0.01)[1].tolist() == [1, 4, 5], "150 after 10 starts a word of its own"


def test_lengths_of_spans() -> None:
    rng = np.random.default_rng(1)
    found = np.bincount(span_lengths(draw(rng, 400_000), 10), minlength=11)[1:] / 400_000
    weights = 0.8 ** np.arange(10)
    assert found == pytest.approx(weights / weights.sum(), abs=0.003)
    assert (found * np.arange(1, 11)).sum() == pytest.approx(3.8, abs=0.02), "the mean of the SpanBERT paper"
    assert set(span_lengths(draw(rng, 1000), 1).tolist()) == {1}
    assert set(span_lengths(draw(rng, 1000), 3).tolist()) == {1, 2, 3}


def runs_of(selected: np.ndarray) -> list[int]:
    return (
        [len(part) for part in np.split(selected, np.flatnonzero(np.diff(selected) > 1) + 1)] if len(selected) else []
    )


def test_spans_are_longer_than_words_and_words_than_tokens() -> None:
    rng, means = np.random.default_rng(2), {}
    for units in ("tokens", *UNITS):
        masks = policy(units=units, probability=0.15)
        lengths: list[int] = []
        for _ in range(100):
            tokens = packed_row(rng, 250)
            lengths += runs_of(masks.corrupt(tokens, draw(rng, len(tokens)), 0.5)[1])
        means[units] = np.mean(lengths)
    assert means["tokens"] < 1.3
    assert 1.9 < means["words"] < 3
    assert 5 < means["spans"] < 10  # 3.8 words of 2 tokens, and some spans meet


@pytest.mark.parametrize("units", UNITS)
def test_every_index_of_a_short_document_is_as_likely(units: str) -> None:
    rng, counts = np.random.default_rng(3), Counter()
    masks = policy(units=units, edges=WordEdges(continues=np.zeros(VOCAB, bool), is_continued=np.zeros(VOCAB, bool)))
    for _ in range(4000):
        tokens = packed_row(rng, 12)
        counts.update(masks.corrupt(tokens, draw(rng, 14), float(rng.random()))[1].tolist())
    fractions = np.array([counts[index] for index in range(1, 13)]) / 4000
    assert fractions == pytest.approx(np.full(12, 0.3), abs=0.03)


def test_a_span_is_replaced_as_a_whole() -> None:
    rng = np.random.default_rng(4)
    masks = policy(units="spans", probability=0.02, mask_fraction=0.4, random_fraction=0.3)
    kinds: Counter[str] = Counter()
    for _ in range(600):
        tokens = packed_row(rng, 200)
        corrupted, selected = masks.corrupt(tokens, draw(rng, len(tokens)), 0.0)
        if len(runs_of(selected)) > 1:
            continue  # Two spans.
        now, before = corrupted[selected], tokens[selected]
        kinds["mask" if (now == MASK).all() else "kept" if (now == before).all() else "random"] += 1
        assert (now == MASK).all() or not (now == MASK).any()
    total = sum(kinds.values())
    assert total > 200
    assert [kinds[kind] / total for kind in ("mask", "random", "kept")] == pytest.approx([0.4, 0.3, 0.3], abs=0.1)


@pytest.mark.parametrize(("masked", "drawn"), [(0.8, 0.1), (0.5, 0.2), (1.0, 0.0), (0.0, 1.0), (0.9, 0.0)])
def test_the_mix_is_configurable(masked: float, drawn: float) -> None:
    rng = np.random.default_rng(5)
    masks = policy(probability=0.5, mask_fraction=masked, random_fraction=drawn)
    tokens = packed_row(rng, 40_000)
    corrupted, selected = masks.corrupt(tokens, draw(rng, len(tokens)), 0.0)
    now, before = corrupted[selected], tokens[selected]
    is_kept, is_masked = (now == before).mean(), (now == MASK).mean()
    assert is_masked == pytest.approx(masked, abs=0.01)
    assert 1 - is_kept - is_masked == pytest.approx(drawn, abs=0.01)
    assert is_kept == pytest.approx(1 - masked - drawn, abs=0.01)


def test_all_masked_in_two_spellings() -> None:
    rng = np.random.default_rng(6)
    tokens, words = packed_row(rng, 200), draw(rng, 202)
    first = policy(mask_all=True).corrupt(tokens, words, 0.5)[0]
    assert (first == policy(mask_fraction=1.0, random_fraction=0.0).corrupt(tokens, words, 0.5)[0]).all()
    without_words = policy(mask_fraction=0.9, random_fraction=0.0, random_ids=np.array([], dtype=np.int32))
    assert set(without_words.corrupt(tokens, words, 0.5)[0].tolist()) <= {*tokens.tolist(), MASK}


def test_the_fraction_changes_linearly_with_the_step() -> None:
    masks = policy(final_probability=0.15, final_step=10)
    assert [masks.rate(step) for step in (0, 1, 5, 9, 10, 11, 1000)] == pytest.approx(
        [0.3, 0.285, 0.225, 0.165, 0.15, 0.15, 0.15]
    )
    rising = policy(probability=0.1, final_probability=0.4, final_step=3)
    assert [rising.rate(step) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    tokens = packed_row(np.random.default_rng(7), 100)
    words = draw(np.random.default_rng(8), 102)
    counts = [len(masks.corrupt(tokens, words, 0.5, step=step)[1]) for step in (0, 4, 10, 99)]
    assert counts == [30, 24, 15, 15]
    assert masks.max_targets(100) == policy().max_targets(100) == 31
    assert rising.max_targets(100) == 41
    assert masks.corrupt(tokens, words, 0.5)[0].tolist() == policy().corrupt(tokens, words, 0.5)[0].tolist()


def test_fewer_masks_later_are_some_of_those_before() -> None:
    """The order of a row's tokens does not depend on the step, so a falling fraction only takes masks away."""
    rng = np.random.default_rng(9)
    tokens, words = packed_row(rng, 30, 50), draw(rng, 84)
    for units in ("tokens", *UNITS):
        masks = policy(units=units, final_probability=0.1, final_step=4)
        indices = [set(masks.corrupt(tokens, words, 0.5, step=step)[1].tolist()) for step in range(5)]
        assert all(later < earlier for earlier, later in pairwise(indices))


def test_settings_that_make_no_mask() -> None:
    with pytest.raises(ValueError, match=r"datacollator\.mlm_probability_final: 1\.5 is outside \(0, 1\]"):
        policy(final_probability=1.5)
    with pytest.raises(ValueError, match=r"mask_units: 'lines' is unknown; write one of tokens, words, spans"):
        policy(units="lines")
    with pytest.raises(ValueError, match="edges: None"):
        policy(units="spans", edges=None)
    masks = policy(final_probability=0.2)
    assert masks.rate(0) == 0.3
    with pytest.raises(ValueError, match="final_step: None"):
        masks.rate(3)
