"""Rates that rows draw: their distributions, bounds, and what masked diffusion learns from them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from definition import MASKS, rows

from neobert.config.load import load_config
from neobert.data.rows.collate import TARGETS_MULTIPLE, Collator
from neobert.data.rows.order import uniforms
from neobert.objectives.masking import RATES, MaskPolicy, mean_rate

NUM_DRAWS = 4000


def drawing(name: str, lowest: float, highest: float) -> MaskPolicy:
    return replace(MASKS, draw_rate=name, rate_range=(lowest, highest))


def draw_rates(policy: MaskPolicy, length: int = 400) -> np.ndarray:
    """The fraction that is predicted of each of many rows of `length` maskable tokens."""
    rng = np.random.default_rng(0)
    tokens = np.full(length, 9, dtype=np.int32)
    hashes = rng.integers(0, 2**64, length, dtype=np.uint64)
    offsets = uniforms(np.arange(NUM_DRAWS, dtype=np.uint64))
    return np.array([len(policy.corrupt(tokens, hashes, offset)[1]) / length for offset in offsets])


def test_random_rates_are_even_over_their_range() -> None:
    rates = draw_rates(drawing("random", 0.1, 0.7))
    counts, _ = np.histogram(rates, bins=6, range=(0.1, 0.7))
    assert counts.min() > 0.9 * NUM_DRAWS / 6
    assert rates.min() >= 0.1 - 1 / 400
    assert rates.max() <= 0.7 + 1 / 400
    assert rates.mean() == pytest.approx(0.4, abs=0.01)


def test_diffusion_rates_learn_what_weights_would() -> None:
    """The sum of f(rate) over predicted tokens, per row, is the same up to one constant for every f, whether rates are
    uniform and a row's sum is divided by its rate, or drawn with density 1 / rate and left alone."""
    lowest, highest = 0.02, 1.0
    found, even = draw_rates(drawing("diffusion", lowest, highest)), draw_rates(drawing("random", lowest, highest))
    functions = [np.ones_like, lambda r: r, lambda r: 5 - 3 * r**2, np.sqrt]
    ratios = [(found * f(found)).mean() / (f(even)).mean() for f in functions]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=0.03)
    assert ratios[0] == pytest.approx((highest - lowest) / np.log(highest / lowest), rel=0.03)
    assert np.median(found) == pytest.approx(np.sqrt(lowest * highest), rel=0.1)


def test_the_low_bits_of_an_offset_round_without_a_bias() -> None:
    """Of five tokens at a rate of 0.3 to 0.3 one and a half are hidden, in the mean."""
    counts = 5 * draw_rates(drawing("random", 0.3, 0.3), length=5)
    assert set(counts.round().tolist()) == {1.0, 2.0}
    assert counts.mean() == pytest.approx(1.5, abs=0.03)


@pytest.mark.parametrize("name", [name for name in RATES if name != "fixed"])
def test_a_batch_has_room_for_every_row_and_not_more_than_it_needs(name: str) -> None:
    policy = drawing(name, 0.01, 1.0)
    settings: dict[str, Any] = {"seed": 1, "draw": "row", "max_seq_length": 256, "max_segments": 8, "pad_id": 0}
    packed = rows(*[(250,)] * 12)
    bounded = Collator(policy=policy, **settings)(packed)
    tight = Collator(policy=policy, varying_targets=True, **settings)(packed)
    assert len(bounded.targets) == 12 * policy.max_targets(256) == 12 * 257
    assert len(tight.targets) - TARGETS_MULTIPLE < tight.num_targets <= len(tight.targets)
    assert len(tight.targets) % TARGETS_MULTIPLE == 0
    assert tight.digest == bounded.digest
    assert tight.targets.tolist() == bounded.targets[: len(tight.targets)].tolist()
    per_row = np.bincount(tight.masked_index[: tight.num_targets].numpy() // 256, minlength=12)
    assert len(set(per_row.tolist())) > 6, "every row has a rate of its own"
    assert (
        Collator(policy=policy, **settings)(packed[:3]).digest
        == Collator(policy=policy, **settings)(packed[:3], step=9).digest
    ), "which is a function of the row alone"


def test_a_range_and_a_fixed_rate_contradict_each_other() -> None:
    base = ["dataset.name=python_stdlib", "tokenizer.train=true", "trainer.max_steps=1"]
    rate = "datacollator.mlm_rate=random"
    for keys, text in (
        ([rate, "datacollator.mlm_probability=0.3"], r"mlm_probability: 0.3 has no effect with datacollator.mlm_rate"),
        ([rate, "datacollator.mlm_probability_final=0.3"], r"mlm_probability_final: 0.3 has no effect with"),
        (["datacollator.mlm_rate_range=[0.1,0.2]"], r"mlm_rate_range: \[0.1, 0.2\] has no effect"),
        ([rate, "datacollator.mlm_rate_range=[0.5,0.2]"], r"mlm_rate_range: \[0.5, 0.2\] must be the smallest"),
        ([rate, "datacollator.mlm_rate_range=[0,1.5]"], r"mlm_rate_range: \[0.0, 1.5\] must be greater than 0"),
    ):
        with pytest.raises(Exception, match=text):
            load_config(None, [*base, *keys])
    with pytest.raises(ValueError, match=r"datacollator\.mlm_rate: 'often' is unknown; write one of fixed, random"):
        replace(MASKS, draw_rate="often")


@pytest.mark.parametrize("name", RATES)
def test_the_mean_rate_is_the_mean_of_the_rates(name: str) -> None:
    drawn = [RATES[name]((number + 0.5) / 10_000, 0.02, 0.8) for number in range(10_000)]
    assert mean_rate("fixed", 0.8, (0.02, 0.5)) == 0.8
    assert mean_rate(name, 0.8, (0.02, 0.8)) == pytest.approx(sum(drawn) / len(drawn), rel=1e-4)
