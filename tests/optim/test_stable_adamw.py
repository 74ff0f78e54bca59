"""StableAdamW against its definition, and against AdamW where gradients do not grow."""

import math

import pytest
import torch
from torch import nn

from neobert.config.schema_optimizer import OptimizerSection
from neobert.optim.optimizers import build_optimizer
from neobert.optim.stable_adamw import relative_size, relative_sizes

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


def test_all_weights_at_once_have_the_sizes_of_one_after_the_other() -> None:
    """As on a GPU; some gradients are zeros, steps differ."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (7,), (1,), (2, 4)]
    grads = [torch.randn(shape, generator=generator) * 10.0**-n for n, shape in enumerate(shapes)]
    grads[1][:4] = 0
    squares = [torch.rand(shape, generator=generator) * 10.0 ** (-9 * n) for n, shape in enumerate(shapes)]
    squares[1][:4] = 0
    steps = [torch.tensor(float(n)) for n in (1, 5, 1000, 2)]
    got = relative_sizes(grads, squares, steps, beta2=0.95, eps=1e-8)
    want = [relative_size(*x, beta2=0.95, eps=1e-8) for x in zip(grads, squares, steps)]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
