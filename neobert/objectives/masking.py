"""Which tokens of a row are predicted, and what replaces them.

Masking is a pure function of a row's tokens, of one 64-bit hash per slot and of the training step. Each row hides
exactly floor(p * maskable + offset) tokens. An offset uniform in [0, 1) makes that number unbiased on short rows, which
plain rounding is not. So the number of targets of a batch has a bound that depends on the settings alone, and shapes
stay static. p may change linearly with the step, the bound is then that of the highest p. Or each row draws its own p
from a range (`RATES`), with the high bits of its offset; the low ones are then the offset, and the bound is that of the
range:

- random: uniformly (R2MAE, arXiv 2509.21650).
- diffusion: with a density proportional to 1/p. Masked diffusion (MDLM, arXiv 2406.07524; LLaDA, arXiv 2502.09992,
  equation 3) draws p uniformly and weights the losses of a row with 1/p. Drawn this way and not weighted, the expected
  loss is the same times a constant, with fewer targets and without the large weights of the smallest p: a row of n
  tokens has p n of them, so p q(p) must be constant in p for the density q.

What is drawn until the number is reached:

- tokens: those with the smallest hashes, or by weights of their own (`token_weights`).
- words: whole words (BERT's whole-word masking), those whose first tokens have the smallest hashes. The last one is cut
  to the number of tokens that is left.
- spans: up to L words in a row (SpanBERT, Joshi et al., arXiv 1907.10529, section 3.1): a span starts at every word,
  its length is l with a probability proportional to 0.8^(l - 1), and spans are drawn in the order of the hashes of
  their first tokens. Those that meet merge; the last one is cut. A span never leaves its document: at its end it
  continues at its start, so that every word is as likely to be hidden.

The hash of a hidden token, mixed again, says what replaces it: [MASK], a random token or the token itself
in 80%, 10% and 10% of cases (Devlin et al., arXiv 1810.04805), in other fractions, or always [MASK] with `mask_all`. In
a span, one hash decides for all tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from neobert.objectives.token_weights import TokenWeights, ring_times
from neobert.splitmix import GAMMA, Hashes, mix
from neobert.types import WordEdges

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MaskPolicy:
    """What is hidden and what replaces it. Raises ValueError for settings that make no mask."""

    probability: float
    """Fraction of the maskable tokens that are predicted, at step 0."""

    mask_all: bool
    """True: every predicted token becomes [MASK]. False: what `mask_fraction` and `random_fraction` say."""

    mask_token_id: int

    special_ids: tuple[int, ...]
    """Tokens that are never predicted: [CLS], [SEP], [PAD], [MASK] and the like, wherever they are."""

    random_ids: NDArray[np.int32]
    """Tokens that a random replacement is drawn from, uniformly: the vocabulary without special tokens."""

    mask_fraction: float = 0.8
    """Fraction of the predicted tokens that becomes [MASK]."""

    random_fraction: float = 0.1
    """Fraction that becomes a random token; the rest stays."""

    final_probability: float | None = None
    """Fraction predicted from step `final_step` on; None: always `probability`."""

    final_step: int | None = None
    """Step at which `final_probability` is reached, at least 1; None when it is not known yet, which is enough for
    step 0."""

    units: str = "tokens"
    """A key of UNITS."""

    span_max_words: int = 10
    edges: WordEdges | None = None
    """Where words begin; None is enough for `tokens`."""

    draw_rate: str = "fixed"
    """A key of RATES; with another than `fixed` there is no `final_probability`."""

    rate_range: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest rate that a row draws."""

    token_weights: TokenWeights | None = None
    """With units `tokens`: how likely each token is hidden. None: all are equal."""

    is_causal = False

    def __post_init__(self) -> None:
        for key, fraction in (("", self.probability), ("_final", self.final_probability)):
            if fraction is not None and not 0 < fraction <= 1:
                raise ValueError(
                    f"datacollator.mlm_probability{key}: {fraction} is outside (0, 1]; write a fraction such as 0.2"
                )
        if self.draw_rate not in ("fixed", *RATES):
            raise ValueError(
                f"datacollator.mlm_rate: {self.draw_rate!r} is unknown; write one of fixed, {', '.join(RATES)}"
            )
        if self.draws_random and len(self.random_ids) == 0:
            raise ValueError(
                "datacollator.mask_all: false draws random replacements, and the vocabulary has special tokens only; "
                "write datacollator.mask_all: true or use another tokenizer"
            )
        if self.draws_random and np.isin(self.random_ids, self.special_ids).any():
            raise ValueError("MaskPolicy.random_ids holds special tokens; leave them out")
        if self.units not in UNITS:
            raise ValueError(f"datacollator.mask_units: {self.units!r} is unknown; write one of {', '.join(UNITS)}")
        if self.units != "tokens" and self.edges is None:
            raise ValueError(f"MaskPolicy.edges: None, but units {self.units!r} need to know where words begin")
        if self.units != "tokens" and self.token_weights is not None:
            raise ValueError(f"MaskPolicy.token_weights: units {self.units!r} have none; write tokens, or leave it out")

    @property
    def draws_random(self) -> bool:
        return not self.mask_all and self.random_fraction > 0

    def rate(self, step: int) -> float:
        """Fraction of the maskable tokens that are predicted at a step, counted from 0.

        Raises:
            ValueError: it depends on a final step that was not set.
        """
        if self.final_probability is None or step == 0:
            return self.probability
        if self.final_step is None:
            raise ValueError(f"MaskPolicy.final_step: None, so the fraction of step {step} is not known")
        return self.probability + (self.final_probability - self.probability) * min(1.0, step / self.final_step)

    def corrupt(
        self, tokens: NDArray[np.int32], hashes: Hashes, offset: float, *, step: int = 0
    ) -> tuple[NDArray[np.int32], Indices]:
        """Hide tokens of one row: `(corrupted i32[n], selected i64[k])`, `selected` ascending. Pure.

        `hashes` holds one uniform 64-bit hash per token, `offset` is uniform in [0, 1), `step` is that of training.
        """
        maskable = self.find_maskable(tokens)
        if self.draw_rate == "fixed":
            rate = self.rate(step)
        else:
            offset, high_bits = math.modf(offset * 2**26)
            rate = RATES[self.draw_rate](high_bits / 2**26, *self.rate_range)
        count = min(len(maskable), math.floor(rate * len(maskable) + offset))
        weights = None if self.token_weights is None else self.token_weights.at(step)
        if weights is None:
            selected, deciding = UNITS[self.units](self, tokens, hashes, maskable, count)
        else:
            selected, deciding = _take_smallest(ring_times(hashes, weights[tokens]), maskable, count), None
        corrupted = tokens.copy()
        if self.mask_all:
            corrupted[selected] = self.mask_token_id
            return corrupted, selected
        # Selected hashes are small numbers: mixed again, all their bits are uniform. The high half says what to do,
        # the low half draws the replacement, scaled by multiply and shift.
        fresh = mix(hashes[selected] + np.uint64(GAMMA))
        choice = (fresh if deciding is None else mix(deciding + np.uint64(GAMMA))) >> np.uint64(32)
        masked_below = _fraction_of_32_bits(self.mask_fraction)
        random_below = _fraction_of_32_bits(self.mask_fraction + self.random_fraction)
        masked = choice < masked_below
        randomised = (choice < random_below) & ~masked
        corrupted[selected[masked]] = self.mask_token_id
        if self.draws_random:
            drawn = ((fresh & np.uint64(0xFFFFFFFF)) * np.uint64(len(self.random_ids))) >> np.uint64(32)
            corrupted[selected[randomised]] = self.random_ids[drawn[randomised]]
        return corrupted, selected

    def find_maskable(self, tokens: NDArray[np.int32]) -> Indices:
        """Indices of the tokens that are no special ones, ascending."""
        is_special = np.zeros(len(tokens), dtype=bool)
        for special in self.special_ids:  # A handful: comparing with each is four times faster than np.isin.
            is_special |= tokens == special
        return np.flatnonzero(~is_special)

    def max_targets(self, num_slots: int) -> int:
        """Upper bound of the number of selected tokens in a row of `num_slots`, at any step."""
        return math.ceil(self.largest_rate * num_slots) + 1

    @property
    def largest_rate(self) -> float:
        """The largest fraction of a row's maskable tokens that is predicted, at any step."""
        if self.draw_rate != "fixed":
            return self.rate_range[1]
        return max(self.probability, self.final_probability or 0.0)


def _fraction_of_32_bits(fraction: float) -> np.uint64:
    """Numbers of 32 bits below this are so large a fraction of all."""
    return np.uint64(min(2**32, math.ceil(fraction * 2**32)))


def _take_smallest(draws: Hashes | NDArray[np.float64], maskable: Indices, count: int) -> Indices:
    if count == len(maskable):
        return maskable
    return np.sort(maskable[np.argpartition(draws[maskable], count)[:count]])


def _choose_tokens(
    policy: MaskPolicy, tokens: NDArray[np.int32], hashes: Hashes, maskable: Indices, count: int
) -> tuple[Indices, Hashes | None]:
    return _take_smallest(hashes, maskable, count), None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Split:
    """The maskable tokens of a row cut into `u` words."""

    maskable: Indices
    """`[m]` indices of the maskable tokens."""

    unit_of: Indices
    """`[m]` word of each of them."""

    first: Indices
    """`[u + 1]` where each word starts among the m, and m."""

    @property
    def starts(self) -> Indices:
        """`[u]` index of each word's first token."""
        return self.maskable[self.first[:-1]]

    def take(self, order: Indices, count: int) -> NDArray[np.bool_]:
        """Which of the m are among the first `count` tokens, word by word in this order."""
        lengths = np.diff(self.first)
        ends = np.cumsum(lengths[order])
        whole = int(np.searchsorted(ends, count, side="right"))
        covered = np.zeros(len(lengths), dtype=np.int64)
        covered[order[:whole]] = lengths[order[:whole]]
        if whole < len(order):
            covered[order[whole]] = count - (ends[whole - 1] if whole else 0)
        return np.arange(len(self.maskable)) - self.first[self.unit_of] < covered[self.unit_of]


def _split(policy: MaskPolicy, tokens: NDArray[np.int32], maskable: Indices) -> _Split:
    edges = policy.edges
    assert edges is not None, "checked when the policy was built"
    here = tokens[maskable]
    begins = np.ones(len(maskable), dtype=bool)
    begins[1:] = (np.diff(maskable) > 1) | ~(edges.continues[here[1:]] & edges.is_continued[here[:-1]])
    first = np.append(np.flatnonzero(begins), len(maskable))
    return _Split(maskable=maskable, unit_of=np.cumsum(begins) - 1, first=first)


def _order_smallest(own: Hashes, count: int) -> Indices:
    """The units with the `count` smallest hashes, in their order. No draw needs more: a unit has a token at least."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    few = np.flatnonzero(own <= np.partition(own, min(count, len(own)) - 1)[min(count, len(own)) - 1])
    return few[np.argsort(own[few], kind="stable")]


def _choose_words(
    policy: MaskPolicy, tokens: NDArray[np.int32], hashes: Hashes, maskable: Indices, count: int
) -> tuple[Indices, Hashes | None]:
    split = _split(policy, tokens, maskable)
    return maskable[split.take(_order_smallest(hashes[split.starts], count), count)], None


def _choose_spans(
    policy: MaskPolicy, tokens: NDArray[np.int32], hashes: Hashes, maskable: Indices, count: int
) -> tuple[Indices, Hashes | None]:
    if count == 0:
        return maskable[:0], hashes[:0]
    split = _split(policy, tokens, maskable)
    own = hashes[split.starts]
    # Words between two special tokens are a run: the first word of each, its number of words, the index in it.
    begins = np.ones(len(own), dtype=bool)
    begins[1:] = split.starts[1:] - maskable[split.first[1:-1] - 1] > 1
    heads, run_of = np.flatnonzero(begins), np.cumsum(begins) - 1
    sizes = np.diff(np.append(heads, len(own)))
    # All spans that can be needed, in their order, written out: the words that each covers, from its first one on.
    spans = _order_smallest(own, count)
    run = run_of[spans]
    lengths = np.minimum(span_lengths(own[spans], policy.span_max_words), sizes[run])
    step = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    head, size = np.repeat(heads[run], lengths), np.repeat(sizes[run], lengths)
    inside = np.repeat(spans - heads[run], lengths) + step
    covered = head + np.where(inside >= size, inside - size, inside)
    # Of the spans that cover a word, the first one counts: written from the back, it is the last to be written.
    at = np.arange(len(covered))
    first_at = np.zeros(len(own), dtype=np.int64)
    first_at[covered[::-1]] = at[::-1]
    is_first = first_at[covered] == at
    drawn = split.take(covered[is_first], count)
    deciding = np.zeros(len(own), dtype=np.uint64)
    deciding[covered[is_first]] = np.repeat(own[spans], lengths)[is_first]
    return maskable[drawn], deciding[split.unit_of[drawn]]


def span_lengths(hashes: Hashes, most: int) -> Indices:
    """Lengths from 1 to `most`, l with a probability proportional to 0.8^(l - 1), one for each random hash."""
    # Another hash than the one that decides about the replacement.
    drawn = mix(~hashes + np.uint64(GAMMA)) >> np.uint64(32)
    return 1 + np.searchsorted(_length_bounds(most), drawn, side="right")


@lru_cache
def _length_bounds(most: int) -> Hashes:
    """Numbers of 32 bits below the n-th bound are lengths up to n; by integers, so that every machine has the same."""
    weights = [4 ** (length - 1) * 5 ** (most - length) for length in range(1, most + 1)]
    bounds = [-(-sum(weights[:length]) * 2**32 // sum(weights)) for length in range(1, most)]
    return np.array(bounds, dtype=np.uint64)


def _draw_evenly(drawn: float, lowest: float, highest: float) -> float:
    return lowest + (highest - lowest) * drawn


def _draw_by_logarithm(drawn: float, lowest: float, highest: float) -> float:
    # Rounded, so that the last bit of a machine's logarithm decides about no token.
    return round(math.exp(_draw_evenly(drawn, math.log(lowest), math.log(highest))) * 2**24) / 2**24


RATES: dict[str, Callable[[float, float, float], float]] = {
    "random": _draw_evenly,
    "diffusion": _draw_by_logarithm,
}
"""`fn(drawn, lowest, highest)`: the rate of a row that drew a number in [0, 1)."""


def mean_rate(name: str, fixed: float, drawn: tuple[float, float]) -> float:
    """The expected rate of a row.

    Args:
        name: `fixed`, or a key of RATES.
        fixed: of every row where none is drawn.
        drawn: the lowest and the highest rate where one is.
    """
    lowest, highest = drawn
    if name == "fixed":
        return fixed
    if name == "random" or lowest == highest:
        return (lowest + highest) / 2
    return (highest - lowest) / math.log(highest / lowest)


UNITS: dict[
    str,
    Callable[[MaskPolicy, NDArray[np.int32], Hashes, Indices, int], tuple[Indices, Hashes | None]],
] = {"tokens": _choose_tokens, "words": _choose_words, "spans": _choose_spans}
"""`fn(policy, tokens, hashes, maskable, count) -> (selected, deciding)`: `count` of the maskable indices, ascending,
and the hashes that decide what replaces them; None: their own."""
