"""Rows of added tokens: every old row keeps its bits, and a new one starts as its way says."""

import pytest
import torch

from neobert.weights.new_rows import INITIAL_ROWS, AddedTokens, add_rows, find_nearest

OLD = {"Ġwalk": 2, "ing": 3, "Ġking": 4, "sea": 5}
ADDED = AddedTokens(texts=["Ġwalking", "zzz"], parts=[(2, 3), (5, 3)], old=OLD, num_old=6, seed=0)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).to(request.param)


@pytest.mark.parametrize("way", INITIAL_ROWS)
def test_old_rows_keep_their_bits(way: str, weight: torch.Tensor) -> None:
    found = add_rows(weight, ADDED, way, 12)
    assert (found.shape, found.dtype) == ((12, 16), weight.dtype)
    assert torch.equal(found[:6], weight[:6])
    assert torch.isfinite(found).all()
    bias = add_rows(weight[:, 0], ADDED, way, 12)
    assert bias.shape == (12,)
    assert torch.equal(bias[:6], weight[:6, 0])


def test_ways(weight: torch.Tensor) -> None:
    old = weight[:6].float()
    rows = {way: add_rows(weight, ADDED, way, 12)[6:8].float() for way in INITIAL_ROWS}
    expected = {
        "fvt": torch.stack([(old[2] + old[3]) / 2, (old[5] + old[3]) / 2]),
        # "zzz" is spelled like none, and has its parts.
        "nearest": torch.stack([old[[2, 3, 4]].mean(0), (old[5] + old[3]) / 2]),
        "mean": old.mean(0).expand(2, -1),
    }
    for way, right in expected.items():
        torch.testing.assert_close(rows[way], right.to(weight.dtype).float(), msg=way)
    assert not torch.equal(rows["random"][0], rows["random"][1])
    again = add_rows(weight, ADDED, "random", 12)[6:8].float()
    assert torch.equal(again, rows["random"])
    drawn = []
    for matrix in (weight, weight.flip(0)):
        kept = matrix[:6].float()
        new = add_rows(matrix, ADDED, "random", 12)[6:8].float()
        drawn.append((new - kept.mean(0)) / kept.std(0))
    assert not torch.allclose(*drawn, atol=0.1), "another matrix has other noise"


def test_the_spelling_that_is_nearest_is_first() -> None:
    assert find_nearest(["Ġwalking", "zzz"], OLD, 2) == [[2, 4], []]
