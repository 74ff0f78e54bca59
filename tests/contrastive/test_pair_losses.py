"""The losses against their definitions, written with loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neobert.objectives.losses import cosent, info_nce, sup_con


def units(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 6, generator=generator, dtype=torch.float64), dim=1)


def reference_info_nce(
    anchors: Tensor, candidates: Tensor, own: list[int], excluded: list[set[int]], scale: float, bonus: Tensor
) -> float:
    total = 0.0
    for i, anchor in enumerate(anchors):
        logits = [scale * float(anchor @ c) + float(bonus[i, j]) for j, c in enumerate(candidates)]
        among = [math.exp(x) for j, x in enumerate(logits) if j not in excluded[i]]
        total -= logits[own[i]] - math.log(sum(among))
    return total


def test_info_nce_is_its_definition() -> None:
    anchors, candidates = units(3, 0), units(7, 1)
    own, excluded = [0, 4, 2], [{3}, set(), {0, 6}]
    mask = torch.zeros(3, 7, dtype=torch.bool)
    for i, columns in enumerate(excluded):
        mask[i, list(columns)] = True
    bonus = torch.zeros(3, 7, dtype=torch.float64)
    bonus[0, 5] = 1.5
    found = info_nce(anchors, candidates, torch.tensor(own), mask, scale=20.0, bonus_NM=bonus)
    assert found.item() == pytest.approx(reference_info_nce(anchors, candidates, own, excluded, 20.0, bonus), rel=1e-12)


def test_a_margin_leaves_out_candidates_that_are_too_similar() -> None:
    anchors = torch.eye(2, dtype=torch.float64)
    candidates = F.normalize(
        torch.tensor([[0.6, 0.8], [0.8, 0.6], [1.0, 0.0], [0.0, -1.0]], dtype=torch.float64), dim=1
    )
    own, none = torch.tensor([0, 1]), torch.zeros(2, 4, dtype=torch.bool)
    # Similarities of row 0: 0.6 (own), 0.8, 1, 0; of row 1: 0.8, 0.6 (own), 0, -1.
    found = info_nce(anchors, candidates, own, none, scale=1.0, margin=0.3)
    first = -0.6 + math.log(math.exp(0.6) + math.exp(0.8) + math.exp(0.0))
    second = -0.6 + math.log(math.exp(0.8) + math.exp(0.6) + math.exp(0.0) + math.exp(-1.0))
    assert found.item() == pytest.approx(first + second, rel=1e-12)
    assert info_nce(anchors, candidates, own, none, scale=1.0, margin=0.5).item() > found.item()


def test_supervised_contrast_is_its_definition() -> None:
    vectors, labels = units(6, 2), [0, 1, 0, 2, 1, 0]
    total = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        same = [j for j in others if labels[j] == labels[i]]
        norm = math.log(sum(math.exp(10 * float(vectors[i] @ vectors[j])) for j in others))
        if same:
            total -= sum(10 * float(vectors[i] @ vectors[j]) - norm for j in same) / len(same)
    both = torch.tensor(labels, dtype=torch.float32)
    leaf = vectors.clone().requires_grad_()
    found = sup_con(leaf, leaf, both, both, torch.arange(6), scale=10.0)
    assert found.item() == pytest.approx(total, rel=1e-12)
    found.backward()
    assert leaf.grad is not None
    assert bool(leaf.grad.isfinite().all()), "a row without another one of its class makes no NaN"


def test_cosent_is_its_definition() -> None:
    similarity = torch.tensor([0.9, 0.1, 0.4, 0.3], dtype=torch.float64)
    scores = torch.tensor([5.0, 4.0, 1.0, 1.0])
    terms = [(1, 0), (2, 0), (3, 0), (2, 1), (3, 1)]  # (j, i): i has the higher score
    expected = math.log(1 + sum(math.exp(20 * float(similarity[j] - similarity[i])) for j, i in terms))
    assert cosent(similarity, scores, scale=20.0).item() == pytest.approx(expected, rel=1e-12)
    equal = torch.ones(3, requires_grad=True)
    loss = cosent(equal, torch.ones(3), scale=20.0)
    loss.backward()
    assert loss.item() == 0
    assert equal.grad is not None
    assert equal.grad.tolist() == [0, 0, 0]
