"""Rank correlation and retrieval on numbers that can be checked by hand."""

import math

import numpy as np
import pytest

from neobert.contrastive.evaluate import retrieval
from neobert.correlation import ranks, spearman


def test_ranks_get_their_mean_where_values_are_equal() -> None:
    assert ranks(np.array([10.0, 30.0, 10.0, 20.0])).tolist() == [1.5, 4.0, 1.5, 3.0]


def test_spearman() -> None:
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([0.1, 5.0, 80.0])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1)
    # 1 - 6 * sum(d^2) / (n (n^2 - 1)) with d = 1, 1, 0, 0
    assert spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 1.0, 3.0, 4.0])) == pytest.approx(0.8)
    assert spearman(np.ones(3), np.arange(3.0)) == 0


def test_retrieval() -> None:
    documents = np.eye(12)
    queries = np.zeros((2, 12))
    queries[0] = np.arange(12, 0, -1)  # Ranks documents 0, 1, 2, ...
    queries[1] = np.arange(12, 0, -1)
    found = retrieval(queries, documents, [[0], [2, 11]])
    ideal = 1 + 1 / math.log2(3)
    assert found["ndcg@10"] == pytest.approx((1 + (1 / math.log2(4)) / ideal) / 2)
    assert found["mrr"] == pytest.approx((1 + 1 / 3) / 2)
    assert retrieval(queries[:1], documents, [[11]]) == {"ndcg@10": 0.0, "mrr": pytest.approx(1 / 12)}
    small = retrieval(np.ones((1, 2)), np.ones((3, 2)), [[1]])
    assert small == {"ndcg@10": pytest.approx(1 / math.log2(3)), "mrr": 0.5}, "equal products keep their order"
