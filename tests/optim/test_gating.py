"""A step that is left out leaves every bit of parameters and optimizer state where it was."""

import copy

import pytest
import torch
from torch import nn

from neobert.config.schema_optimizer import OptimizerSection
from neobert.optim.optimizers import OPTIMIZERS, build_optimizer, step_unless


def build(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    block = nn.ModuleDict({"qkv": nn.Linear(5, 15), "down": nn.Linear(8, 5)})
    module = nn.ModuleDict({"0": nn.Embedding(7, 5), "1": nn.Linear(5, 3), "layers": nn.ModuleList([block])})
    return module, build_optimizer(module, OptimizerSection(name=name, lr=0.1))


def make_step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int, *, bad: bool = False) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        if bad:
            parameter.grad.view(-1)[0] = torch.nan
    step_unless(optimizer, torch.tensor(bad))


def everything(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Weights and every tensor of the optimizer, by name."""
    found = {f"weight.{name}": value for name, value in module.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        found |= {f"{number}.{name}": value for name, value in state.items()}
    return copy.deepcopy(found)


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_left_out_changes_nothing_and_the_next_does_not_know_of_it(name: str) -> None:
    module, optimizer = build(name)
    clean_module, clean_optimizer = build(name)
    for seed in (1, 2):
        make_step(module, optimizer, seed)
        make_step(clean_module, clean_optimizer, seed)
    before = everything(module, optimizer)
    make_step(module, optimizer, 3, bad=True)
    assert_same_bits(everything(module, optimizer), before)
    make_step(module, optimizer, 4)
    make_step(clean_module, clean_optimizer, 4)
    assert_same_bits(everything(module, optimizer), everything(clean_module, clean_optimizer))
    assert not torch.equal(everything(module, optimizer)["weight.1.weight"], before["weight.1.weight"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_very_first_step_can_be_left_out(name: str) -> None:
    module, optimizer = build(name)
    clean_module, clean_optimizer = build(name)
    make_step(module, optimizer, 1, bad=True)
    make_step(module, optimizer, 2)
    make_step(clean_module, clean_optimizer, 2)
    assert_same_bits(everything(module, optimizer), everything(clean_module, clean_optimizer))


def test_an_optimizer_that_does_not_read_the_flag_is_an_error() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="SGD cannot leave out a step on the device: build it with fused=True"):
        step_unless(torch.optim.SGD(module.parameters(), lr=0.1), torch.tensor(False))
