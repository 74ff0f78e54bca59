"""Matrices on the unit sphere after every step, and not a bit elsewhere after one that is left out."""

import pytest
import torch

from neobert.config.schema_optimizer import OptimizerSection
from neobert.optim.optimizers import OPTIMIZERS, build_optimizer, keep_unit_length, step_unless


def build(name: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 4, bias=False), torch.nn.Linear(4, 4))
    optimizer = build_optimizer(module, OptimizerSection(name=name, lr=0.1, weight_decay=0.0))
    keep_unit_length(optimizer, [(module[0].weight, 1), (module[1].weight, 0)])
    return module, optimizer


def make_step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, *, skip: bool = False) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape)
    step_unless(optimizer, torch.tensor(skip))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_listed_matrices_have_length_one_after_every_step(name: str) -> None:
    module, optimizer = build(name)
    for _ in range(3):
        make_step(module, optimizer)
        torch.testing.assert_close(module[0].weight.norm(dim=1), torch.ones(3))
        torch.testing.assert_close(module[1].weight.norm(dim=0), torch.ones(3))
        assert not torch.allclose(module[2].weight.norm(dim=1), torch.ones(4), atol=0.01)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    make_step(module, optimizer, skip=True)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_plain_step_scales_too_and_no_matrices_add_nothing() -> None:
    module, optimizer = build("adamw")
    module[0].weight.grad = torch.randn(3, 5)
    optimizer.step()
    torch.testing.assert_close(module[0].weight.norm(dim=1), torch.ones(3))
    other = torch.optim.SGD(module.parameters(), lr=0.1)
    keep_unit_length(other, [])
    assert not other._optimizer_step_post_hooks
