"""What frozen vectors of texts know of a class: nearest neighbours, and a linear classifier in closed form.

Both leave one out: every text is classified by all the others, so that a small set needs no split. numpy and torch are
enough for that, so the trainer needs no scikit-learn; a test compares both with a loop that leaves each text out.

Legend: N texts, H width, C classes.
"""

import numpy as np
import torch
from numpy.typing import NDArray

NEIGHBOURS = 10
PENALTY = 0.1
"""Of the ridge regression, for each text: of features with variance 1, directions with less variance than this count
little."""

_ROWS = 1024
"""Texts that are compared with all others at once."""


def knn_accuracy(vectors_NH: NDArray[np.float32], classes_N: NDArray[np.int64]) -> float:
    """Fraction of the texts whose class most of their `NEIGHBOURS` nearest others have, by cosine. Votes weigh 1 plus
    the cosine."""
    units = torch.nn.functional.normalize(torch.from_numpy(vectors_NH).double(), dim=1)
    classes = torch.from_numpy(classes_N)
    num_classes, num_right = int(classes.max()) + 1, 0
    for start in range(0, len(units), _ROWS):
        cosines = units[start : start + _ROWS] @ units.T
        own = torch.arange(len(cosines))
        cosines[own, start + own] = -torch.inf
        best = cosines.topk(min(NEIGHBOURS, len(units) - 1), dim=1)
        votes = cosines.new_zeros(len(cosines), num_classes).scatter_add_(1, classes[best.indices], 1 + best.values)
        num_right += int((votes.argmax(dim=1) == classes[start : start + _ROWS]).sum())
    return num_right / len(units)


def ridge_accuracy(vectors_NH: NDArray[np.float32], classes_N: NDArray[np.int64]) -> float:
    """Fraction of the texts whose class a ridge regression on the other texts gives the largest output.

    Features are scaled to mean 0 and variance 1 over all texts, and an intercept has no penalty. What the regression
    without text i says of it is (fit_i - h_i y_i) / (1 - h_i), with h_i the diagonal of the hat matrix.
    """
    vectors, classes = torch.from_numpy(vectors_NH).double(), torch.from_numpy(classes_N)
    features = vectors - vectors.mean(dim=0)
    features = features / features.std(dim=0, correction=0).clamp(min=1e-12)
    features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
    penalty = features.new_full((features.shape[1],), PENALTY * len(features))
    penalty[-1] = 0.0
    solved = torch.linalg.solve(features.T @ features + penalty.diag(), features.T)
    leverage = (features * solved.T).sum(dim=1, keepdim=True)
    targets = torch.nn.functional.one_hot(classes).double()
    left_out = (features @ (solved @ targets) - leverage * targets) / (1 - leverage)
    return float((left_out.argmax(dim=1) == classes).double().mean())
