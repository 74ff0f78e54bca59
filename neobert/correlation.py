"""How well two rows of numbers go together: correlations of values and of ranks."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.integer[Any]] | NDArray[np.floating[Any]]


def ranks(values: Numbers) -> NDArray[np.float64]:
    """Ranks from 1; equal values get the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + 1 + ends) / 2)[inverse]


def pearson(a: Numbers, b: Numbers) -> float:
    """Pearson's correlation; 0 where one of them is constant."""
    first, second = a - np.mean(a, dtype=np.float64), b - np.mean(b, dtype=np.float64)
    norm = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / norm if norm else 0.0


def spearman(a: Numbers, b: Numbers) -> float:
    """Spearman's rank correlation: Pearson's of the ranks; 0 where one of them is constant."""
    return pearson(ranks(a), ranks(b))
