"""The moving average of the weights: its formula, what it leaves alone, and that it never waits for the device."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from neobert.optim.moving_average import WeightAverage, effective_decay

GOES_ON, SKIPPED = torch.tensor(False), torch.tensor(True)


def build_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2, bias=False), nn.LayerNorm(2))


def move(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def test_the_decay_of_a_young_average_is_small() -> None:
    assert [effective_decay(n, 0.9) for n in (0, 1, 3, 9, 81, 82, 10**6)] == [0, 0.1, 0.25, 0.5, 0.9, 0.9, 0.9]


def test_the_average_follows_its_formula() -> None:
    module = build_module()
    average = WeightAverage(module, decay=0.25, start_step=2)
    average.begin(0)
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 9):
        move(module)
        weights = {name: p.detach().double() for name, p in module.named_parameters()}
        average.update(step, GOES_ON)
        assert average.started == (step >= 2)
        if step == 2:
            expected = copies(weights)
        elif step > 2:
            decay = min(0.25, (step - 2) / (step + 7))
            expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in weights}
    for name, tensor in average.tensors().items():
        assert torch.allclose(tensor.double(), expected[name], atol=1e-6)


def test_a_skipped_step_moves_no_bit() -> None:
    module = build_module()
    average = WeightAverage(module, decay=0.9)
    average.begin(0)
    move(module)
    before = copies(average.tensors())
    average.update(1, SKIPPED)
    assert all(torch.equal(average.tensors()[name], before[name]) for name in before)
    average.update(2, GOES_ON)
    assert not any(torch.equal(average.tensors()[name], before[name]) for name in before)


def test_inside_swapped_the_module_has_the_average_and_afterwards_its_weights_whatever_happens() -> None:
    module = build_module()
    average = WeightAverage(module, decay=0.5)
    average.begin(0)
    move(module)
    average.update(1, GOES_ON)
    weights, averaged = copies(dict(module.named_parameters())), copies(average.tensors())

    def fails_inside() -> None:
        with average.swapped():
            assert all(torch.equal(p, averaged[name]) for name, p in module.named_parameters())
            raise RuntimeError("evaluation failed")

    with pytest.raises(RuntimeError, match="evaluation failed"):
        fails_inside()
    assert all(torch.equal(p, weights[name]) for name, p in module.named_parameters())
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in average.tensors().items())


def test_an_average_that_was_saved_continues_and_one_that_lacks_a_weight_is_an_error() -> None:
    module = build_module()
    whole, resumed = (WeightAverage(module, decay=0.99) for _ in range(2))
    whole.begin(0)
    for step in range(1, 9):
        move(module)
        if step == 5:
            resumed.begin(4, copies(whole.tensors()))
        whole.update(step, GOES_ON)
        if step >= 5:
            resumed.update(step, GOES_ON)
    assert all(torch.equal(tensor, resumed.tensors()[name]) for name, tensor in whole.tensors().items())
    with pytest.raises(KeyError, match=r"0.weight"):
        resumed.begin(4, {"1.weight": torch.zeros(2)})
    with pytest.raises(RuntimeError, match="step 7"):
        WeightAverage(module, decay=0.9, start_step=7).tensors()


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_an_update_is_one_operator_over_all_weights_and_reads_nothing_back() -> None:
    module = build_module()
    average = WeightAverage(module, decay=0.9)
    average.begin(0)
    with Operators() as seen:
        average.update(1, GOES_ON)
    assert seen.names.count("_foreach_lerp_") == 1
    assert "_local_scalar_dense" not in seen.names
    assert len(seen.names) < 8
