"""Figures of merit of embeddings: rank correlation with scores, and retrieval. numpy alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

TOP = 10
_QUERIES = 256
"""Queries compared with the whole collection at once."""


def ranks(values: Floats) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of their ranks."""
    order = np.argsort(values, kind="stable")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    assert len(order) == ends[-1]
    return ((ends - counts + 1 + ends) / 2)[inverse]


def spearman(a: Floats, b: Floats) -> float:
    """Spearman's rank correlation: Pearson's of the ranks; 0 where one of them is constant."""
    first, second = ranks(a), ranks(b)
    first, second = first - first.mean(), second - second.mean()
    norm = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / norm if norm else 0.0


def retrieval(queries_QD: Floats, documents_CD: Floats, relevant: Sequence[Sequence[int]]) -> dict[str, float]:
    """Mean nDCG@10 and mean reciprocal rank of the first relevant document, by scalar products.

    Args:
        relevant: numbers of the documents that answer each query, at least one.

    Gains are 0 or 1, discounted by log2(1 + rank) (Järvelin & Kekäläinen, 2002). Equal products are ranked in the
    order of the documents.
    """
    discounts = 1 / np.log2(np.arange(2, TOP + 2))
    ndcg, reciprocal = [], []
    for start in range(0, len(queries_QD), _QUERIES):
        products = queries_QD[start : start + _QUERIES] @ documents_CD.T
        orders = np.argsort(-products, axis=1, kind="stable")
        for order, wanted in zip(orders, relevant[start : start + _QUERIES]):
            hits = np.isin(order, list(wanted))
            gain = float((hits[:TOP] * discounts[: len(hits)]).sum())
            ndcg.append(gain / float(discounts[: len(wanted)].sum()))
            reciprocal.append(1 / (1 + int(np.argmax(hits))))
    return {f"ndcg@{TOP}": float(np.mean(ndcg)), "mrr": float(np.mean(reciprocal))}
