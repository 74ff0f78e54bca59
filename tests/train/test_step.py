"""One optimizer step: normalisation over micro-batches, clipping after scaling."""

import pytest
import torch
from torch import nn

from neobert.train.step import train_step
from neobert.types import LossSum


class SumOfSquares(nn.Module):
    """A stand-in objective: the loss sum of a batch of numbers is sum((w * x)^2)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, -1.0]))

    def forward(self, batch: torch.Tensor) -> LossSum:
        return LossSum(loss_sum=((self.weight * batch) ** 2).sum())


def step(batches: list[torch.Tensor], clipping: float | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    model = SumOfSquares()
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0, fused=True)
    count = sum(b.shape[0] for b in batches)
    result = train_step(model, optimizer, batches, lr=0.1, scale=1 / count, gradient_clipping=clipping)  # type: ignore[arg-type]
    return model.weight.detach(), result.grad_norm


def test_uneven_micro_batches_equal_one_batch() -> None:
    rows = torch.arange(10.0).reshape(5, 2)
    whole, whole_norm = step([rows])
    split, split_norm = step([rows[:1], rows[1:]])
    torch.testing.assert_close(split, whole)
    torch.testing.assert_close(split_norm, whole_norm)


def test_clipping_acts_on_the_scaled_gradient_and_reports_the_norm_before() -> None:
    rows = torch.ones(4, 2)
    weights, norm = step([rows], clipping=1.0)
    gradient = 2 * torch.tensor([2.0, -1.0])
    torch.testing.assert_close(norm, gradient.norm())
    torch.testing.assert_close(
        weights, torch.tensor([2.0, -1.0]) - 0.1 * gradient / gradient.norm(), rtol=1e-4, atol=1e-5
    )


def test_a_group_has_its_multiple_of_the_learning_rate() -> None:
    model = SumOfSquares()
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr_factor": 0.5}], lr=123.0, fused=True)
    train_step(model, optimizer, [torch.ones(1, 2)], lr=0.1, scale=1.0)  # type: ignore[list-item]
    assert model.weight.tolist() == pytest.approx([2.0 - 0.05 * 4.0, -1.0 + 0.05 * 2.0])


def test_learning_rate_of_the_call_replaces_the_one_of_the_optimizer() -> None:
    weights, _ = step([torch.ones(1, 2)])
    assert weights.tolist() == pytest.approx([2.0 - 0.1 * 4.0, -1.0 + 0.1 * 2.0])
