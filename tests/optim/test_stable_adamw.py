"""StableAdamW against its definition, and against AdamW where gradients do not grow."""

import math

import pytest
import torch
from torch import nn

from neobert.config.schema_optimizer import OptimizerSection
from neobert.optim.optimizers import build_optimizer

BETAS, EPS, LR, DECAY = (0.9, 0.95), 1e-8, 0.1, 0.2


def train(name: str, gradients: list[torch.Tensor]) -> torch.Tensor:
    module = nn.Linear(3, 2, bias=False)
    nn.init.constant_(module.weight, 1.0)
    section = OptimizerSection(name=name, lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS)  # type: ignore[arg-type]
    optimizer = build_optimizer(module, section)
    for gradient in gradients:
        module.weight.grad = gradient.clone()
        optimizer.step()
    return module.weight.detach()


def by_hand(gradients: list[torch.Tensor]) -> list[float]:
    """Number by number, in Python floats."""
    weights, means, squares = [1.0] * 6, [0.0] * 6, [0.0] * 6
    for step, gradient in enumerate(gradients, start=1):
        g = gradient.flatten().tolist()
        means = [BETAS[0] * m + (1 - BETAS[0]) * x for m, x in zip(means, g)]
        squares = [BETAS[1] * v + (1 - BETAS[1]) * x * x for v, x in zip(squares, g)]
        debiased = [v / (1 - BETAS[1] ** step) for v in squares]
        rms = math.sqrt(sum(x * x / max(v, EPS**2) for x, v in zip(g, debiased)) / 6)
        lr = LR / max(1.0, rms)
        for i in range(6):
            update = means[i] / (1 - BETAS[0] ** step) / (math.sqrt(debiased[i]) + EPS)
            weights[i] = weights[i] * (1 - lr * DECAY) - lr * update
    return weights


def test_it_is_the_definition_also_when_gradients_grow_and_shrink() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(2, 3) * scale for scale in (1, 1, 30, 0.01, 1)]
    assert train("stable_adamw", gradients).flatten().tolist() == pytest.approx(by_hand(gradients), rel=1e-5)


def test_gradients_of_constant_size_are_those_of_adamw_and_a_sudden_one_moves_less() -> None:
    constant = [torch.full((2, 3), 0.5)] * 4
    torch.testing.assert_close(train("stable_adamw", constant), train("adamw", constant))
    sudden = [*constant, torch.full((2, 3), 50.0)]
    before = train("adamw", constant)
    moved, plain = ((train(name, sudden) - before).abs() for name in ("stable_adamw", "adamw"))
    assert (moved < 0.5 * plain).all()


def test_a_gradient_of_zeros_moves_nothing_but_the_decay() -> None:
    torch.testing.assert_close(train("stable_adamw", [torch.zeros(2, 3)]), torch.full((2, 3), 1 - LR * DECAY))
