"""Masks by weights of tokens: what is drawn, when weights are refreshed, and that hard tokens are hidden more."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from neobert.errors import DataError
from neobert.objectives.masking import MaskPolicy
from neobert.objectives.token_weights import LEAD, LOWEST, MEASURED, PRIOR, TokenWeights, ring_times, weigh

VOCAB = 50


def draw(rng: np.random.Generator, size: int) -> NDArray[np.uint64]:
    return rng.integers(0, 2**64, size=size, dtype=np.uint64)


class Fixed(TokenWeights):
    """The same weights at every step."""

    def __init__(self, weights: NDArray[np.float64]) -> None:
        super().__init__(len(weights), 2)
        self._known = dict.fromkeys(range(100), weights)


def policy(weights: TokenWeights | None, **changes: Any) -> MaskPolicy:
    values: dict[str, Any] = {
        "probability": 0.2,
        "mask_all": False,
        "mask_token_id": 3,
        "special_ids": (0, 1, 2, 3),
        "random_ids": np.arange(4, VOCAB, dtype=np.int32),
        "token_weights": weights,
    }
    return MaskPolicy(**{**values, **changes})


@pytest.mark.parametrize("weight", [1.0, 0.3, 1e-3])
def test_equal_weights_are_the_masks_without_weights(weight: float) -> None:
    rng = np.random.default_rng(0)
    equal = policy(Fixed(np.full(VOCAB, weight)))
    for length in (0, 1, 7, 126, 500):
        for probability in (0.2, 1.0):
            tokens, hashes = rng.integers(0, VOCAB, size=length, dtype=np.int32), draw(rng, length)
            one, other = (
                MaskPolicy.corrupt(x, tokens, hashes, 0.5)
                for x in (policy(None, probability=probability), policy(equal.token_weights, probability=probability))
            )
            assert (one[0] == other[0]).all()
            assert (one[1] == other[1]).all()


def test_a_draw_of_one_follows_the_weights() -> None:
    weights = np.ones(VOCAB)
    weights[10:14] = [0.1, 0.2, 0.3, 0.4]
    tokens, rng, hidden = np.array([1, 10, 11, 12, 13, 2], dtype=np.int32), np.random.default_rng(1), np.zeros(VOCAB)
    masks = policy(Fixed(weights), probability=0.25)
    for _ in range(10_000):
        _, selected = masks.corrupt(tokens, draw(rng, 6), 0.0)
        hidden[tokens[selected]] += 1
    assert hidden.sum() == 10_000
    assert hidden[10:14] / 10_000 == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=4 * np.sqrt(0.25 / 10_000))


def test_a_draw_of_two_is_without_replacement() -> None:
    """P(hidden) by hand: first with w / 1, second with w / (1 - w of the first)."""
    weights = np.array([0.1, 0.2, 0.7])
    expected = [w + sum(v * w / (1 - v) for v in weights if v != w) for w in weights]
    table, tokens = np.ones(VOCAB), np.array([10, 11, 12], dtype=np.int32)
    table[10:13] = weights
    masks, rng, hidden = policy(Fixed(table), probability=2 / 3 + 1e-9), np.random.default_rng(2), np.zeros(VOCAB)
    for _ in range(10_000):
        corrupted, selected = masks.corrupt(tokens, draw(rng, 3), 0.0)
        assert len(selected) == 2
        assert corrupted.shape == (3,)
        hidden[tokens[selected]] += 1
    assert hidden[10:13] / 10_000 == pytest.approx(expected, abs=4 * np.sqrt(0.25 / 10_000))


def test_what_replaces_a_token_does_not_follow_its_weight() -> None:
    weights = np.ones(VOCAB)
    weights[10] = 0.1
    masks, rng = policy(Fixed(weights)), np.random.default_rng(3)
    masked, chosen = np.zeros(2), np.zeros(2)
    for _ in range(4000):
        tokens = np.where(rng.random(60) < 0.5, 10, 11).astype(np.int32)
        corrupted, selected = masks.corrupt(tokens, draw(rng, 60), 0.0)
        for number, token in enumerate((10, 11)):
            of_token = selected[tokens[selected] == token]
            masked[number] += (corrupted[of_token] == 3).sum()
            chosen[number] += len(of_token)
    assert chosen[1] > 6 * chosen[0]
    assert masked / chosen == pytest.approx([0.8, 0.8], abs=0.02)


def test_hashes_at_the_ends_ring_in_finite_time() -> None:
    times = ring_times(np.array([0, 1, 2**11, 2**63, 2**64 - 1], dtype=np.uint64), np.ones(5))
    assert np.isfinite(times).all()
    assert (np.diff(times[1:]) > 0).all()
    assert times[3] == pytest.approx(np.log(2))


def test_the_weights_of_counts() -> None:
    assert weigh(np.zeros((2, 3))) is None
    assert weigh(np.array([[2.0, 3.0], [2.0, 3.0]])) is None, "everything is right"
    right, seen = np.array([0.0, 100, 50, 0]), np.array([100.0, 100, 100, 0])
    mean = 150 / 300
    expected = 1 - (right + PRIOR * mean) / (seen + PRIOR)
    expected[1] = LOWEST * expected[0]
    found = weigh(np.stack([right, seen]))
    assert found == pytest.approx(expected)
    assert found is not None
    assert found[3] == mean, "a token that was never a target has the mean rate"


@pytest.mark.parametrize("every", [2, 3, 4, 15, 16, 200])
def test_weights_are_known_in_time(every: int) -> None:
    """A trainer at step s needs the batches of s and s + 1, whatever the interval: so it never waits for itself."""
    weights, counted = TokenWeights(4, every), 0
    assert 1 <= weights.lead <= LEAD
    for step in range(5 * every):
        assert weights.is_known(step)
        assert weights.is_known(step + 1)
        weights.at(step)
        counted += weights.is_measured(step)
        if weights.is_due(step + 1):
            assert 1 <= counted <= MEASURED
            assert not weights.is_known(weights.end)
            with pytest.raises(DataError, match=r"mask_weights: adaptive: the masks of step .*: uniform"):
                weights.at(weights.end)
            counts = np.array([[0, 0, 1, 2], [3, 3, 3, 3]])
            weights.refresh(step + 1, counts)
            counted = 0
            assert weights.end // every == (step + 1) // every + 2
    assert weights.at(5 * every - 1) is not None


@pytest.mark.parametrize("step", [1, 11, 12, 15, 16, 27, 28, 29])
def test_it_continues_at_any_step(step: int) -> None:
    rng = np.random.default_rng(step)
    counts = {at: rng.integers(0, 9, size=(2, 6)) + np.array([[0], [9]]) for at in (8, 24, 40)}

    def train(weights: TokenWeights, first: int, last: int) -> list[list[float] | None]:
        seen = []
        for at in range(first, last):
            table = weights.at(at)
            seen.append(None if table is None else table.tolist())
            if weights.is_due(at + 1):
                weights.refresh(at + 1, counts[at + 1])
        return seen

    whole, parts = TokenWeights(6, 16), TokenWeights(6, 16)
    expected = train(whole, 0, 45)
    assert train(parts, 0, step) == expected[:step]
    again = TokenWeights(6, 16)
    again.begin(step, parts.counts)
    assert again.end == parts.end
    assert train(again, step, 45) == expected[step:]


def test_units_other_than_tokens_have_no_weights() -> None:
    with pytest.raises(ValueError, match=r"token_weights: units 'words' have none"):
        policy(TokenWeights(VOCAB, 2), units="words", edges=object())
