"""How likely each token of the vocabulary is hidden: the worse it is predicted, the likelier.

Edman and Fraser, "Mask and You Shall Receive" (arXiv 2510.20475), adapt the masking of a type of token to how well the
model predicts it, from its right predictions so far, and refresh that every 200 steps while the fraction of masked
tokens falls. The formula is our own, since the details of theirs were not at hand: with the counts of the targets of
the measured steps before a refresh,

    seen_v  <- DECAY seen_v  + targets that are v
    right_v <- DECAY right_v + targets that are v, where v is the most likely token
    r_v = (right_v + PRIOR R) / (seen_v + PRIOR),   R = sum of right / sum of seen
    w_v = max(1 - r_v, LOWEST max_u (1 - r_u))

A token that was rarely a target has about the mean rate R. The number of hidden tokens of a row does not depend on the
weights. Which they are is a draw without replacement, each next one with a probability proportional to its weight: the
tokens whose exponential clock of rate w rings first (Efraimidis and Spirakis, Weighted random sampling with a
reservoir, 2006).

When: an interval is K steps, and step s has the weights of interval s // K. They are those of `lead` steps before its
first step, measured on the MEASURED steps before that, each on its own batch before the model learns from it. So the
batch of a step is the same whatever is read ahead: who makes batches may be `lead` steps ahead of the training without
waiting, and one step ahead is always possible, because `lead` is at least 1. The first interval has equal weights.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from neobert.errors import DataError
from neobert.splitmix import Hashes

LEAD = 8
"""Most steps between a refresh and the first step that it decides about: more than are read ahead by default."""

MEASURED = 8
"""Steps before a refresh whose targets are counted."""

DECAY = 0.75
"""What counts of earlier refreshes are worth at the next one."""

PRIOR = 4.0
"""Targets at the mean rate that every token starts with."""

LOWEST = 0.1
"""Of the largest weight: what is predicted well is asked all the same."""

Counts = NDArray[np.float64]
"""`[2, V]`: right predictions and targets of each token."""


class TokenWeights:
    """The weights of each interval. The thread that trains refreshes them, the one that makes batches reads them."""

    def __init__(self, num_tokens: int, every: int) -> None:
        """`every`: K, at least 2, the number of steps of an interval."""
        self.num_tokens, self.every = num_tokens, every
        self.begin(0)

    def begin(self, step: int, saved: Mapping[str, Counts] | None = None) -> None:
        """Continues at `step`, counted from 0, with the counts that `saved` has (see `counts`), or with equal weights.

        Intervals before that of `step` are unknown afterwards.
        """
        nothing: Counts = np.zeros((2, self.num_tokens))
        self._before, self._after = (nothing, nothing) if saved is None else (saved["before"], saved["after"])
        known = {step // self.every: weigh(self._before)}
        self._known = known | {(step + self.lead) // self.every: weigh(self._after)}

    @property
    def counts(self) -> dict[str, Counts]:
        """What the last two refreshes counted, with what they kept of those before; `after` is the last one's."""
        return {"before": self._before, "after": self._after}

    @property
    def lead(self) -> int:
        """Steps from a refresh to the interval that it decides about."""
        return min(LEAD, self.every // 2)

    @property
    def end(self) -> int:
        """The first step whose weights are not known yet."""
        return (max(self._known) + 1) * self.every

    def is_known(self, step: int) -> bool:
        """Whether there are weights for the batch of `step`."""
        return step // self.every in self._known

    def at(self, step: int) -> NDArray[np.float64] | None:
        """The weights `[V]` of the batch of `step`; None where they are equal.

        Raises:
            DataError: they are not known.
        """
        if not self.is_known(step):
            raise DataError(
                f"datacollator.mask_weights: adaptive: the masks of step {step + 1} follow what the model predicts in "
                f"the steps before, so only training knows them; read rows of the first {self.every} steps, or write "
                "datacollator.mask_weights: uniform"
            )
        return self._known[step // self.every]

    def is_measured(self, step: int) -> bool:
        """Whether the targets of the batch of `step` are counted."""
        return (step + self.lead) % self.every >= self.every - MEASURED

    def is_due(self, step: int) -> bool:
        """Whether a refresh follows after `step` steps."""
        return (step + self.lead) % self.every == 0

    def refresh(self, step: int, counted: NDArray[np.int64]) -> None:
        """Fixes the weights of the next interval after `step` steps, from the counts `[2, V]` of all ranks."""
        self._before, self._after = self._after, DECAY * self._after + counted
        interval = (step + self.lead) // self.every
        kept = {number: known for number, known in self._known.items() if number == interval - 1}
        self._known = kept | {interval: weigh(self._after)}


def weigh(counts: Counts) -> NDArray[np.float64] | None:
    """The weights `[V]` of the formula above; None where there is no reason for unequal ones."""
    right, seen = counts
    if not seen.any():
        return None
    mean = right.sum() / seen.sum()
    wrong = 1 - (right + PRIOR * mean) / (seen + PRIOR)
    return np.maximum(wrong, LOWEST * wrong.max()) if wrong.max() > 0 else None


def ring_times(hashes: Hashes, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """When an exponential clock of each rate rings, by uniform hashes: with equal rates in the order of the hashes."""
    # Their first 53 bits are exact in a double, and less than 1.
    return -np.log1p((hashes >> np.uint64(11)) * -(2.0**-53)) / weights
