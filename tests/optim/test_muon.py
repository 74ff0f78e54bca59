"""Muon and NorMuon against their definitions, one matrix at a time."""

import copy
import itertools
from typing import Any

import pytest
import torch
from block_weights import Model

from neobert.config.schema_optimizer import MuonSection, OptimizerSection
from neobert.optim.muon import NORM_FACTORS, equal_row_scales, reference_muon, split_rows
from neobert.optim.optimizers import build_optimizer, step_unless
from neobert.optim.orthogonal import (
    ORTHOGONALIZATIONS,
    orthogonalize,
    polar_express,
    reference_orthogonal,
)
from neobert.optim.owners import Owners, list_matrices


def build(name: str, weights: torch.dtype = torch.float32, **muon: Any) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = Model().to(weights)
    own = MuonSection(muon_decay=0.3, **muon)
    section = OptimizerSection(name=name, lr=0.1, weight_decay=0.3, muon_config=own)  # type: ignore[arg-type]
    return module, build_optimizer(module, section, dtype=weights)


def gradients(module: Model, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in module.parameters()]


def make_steps(module: Model, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        for p, grad in zip(module.parameters(), gradients(module, seed)):
            p.grad = grad
        optimizer.step()


@pytest.mark.parametrize(
    ("method", "nesterov", "factor", "name", "num_steps"),
    [
        *itertools.product(ORTHOGONALIZATIONS, (False, True), NORM_FACTORS, ("muonclip", "normuon"), (5,)),
        ("polar_express", False, "none", "muonclip", 1),
        ("polar_express", False, "none", "normuon", 10),
        ("newton_schulz", False, "none", "muonclip", 3),
    ],
)
def test_three_steps_equal_the_definition(method: str, nesterov: bool, factor: str, name: str, num_steps: int) -> None:
    settings: dict[str, Any] = {
        "muon_beta": 0.8,
        "nesterov": nesterov,
        "orthogonalization": method,
        "ns_steps": num_steps,
        "norm_factor": factor,
        "normuon_beta2": 0.9,
    }
    module, optimizer = build(name, torch.float64, **settings)
    before = copy.deepcopy(module.state_dict())
    make_steps(module, optimizer, range(3))
    grads = {n: [gradients(module, s)[i] for s in range(3)] for i, (n, _) in enumerate(module.named_parameters())}
    compared = 0
    for key, weight in module.state_dict().items():
        if not key.startswith("layers") or weight.ndim < 2:
            continue
        parts = {"qkv": 3, "gate_up": 2}.get(key.split(".")[-2], 1)
        size = weight.shape[0] // parts
        for part in (slice(i * size, (i + 1) * size) for i in range(parts)):
            wanted = reference_muon(
                before[key][part],
                [g[part] for g in grads[key]],
                section=MuonSection(**settings),
                equal_rows=name == "normuon",
                lr=0.1,
                weight_decay=0.3,
            )
            torch.testing.assert_close(weight[part], wanted, rtol=1e-9, atol=1e-9)
            compared += 1
    assert compared == 2 * 7


def test_everything_but_the_matrices_of_the_blocks_is_adamw_to_the_bit() -> None:
    module, optimizer = build("normuon")
    other, adamw = build("adamw")
    make_steps(module, optimizer, range(4))
    make_steps(other, adamw, range(4))
    for name, weight in module.state_dict().items():
        same = torch.equal(weight, other.state_dict()[name])
        assert same == (name.endswith("norm") or "layers" not in name), name


def test_a_saved_state_continues_to_the_bit() -> None:
    module, optimizer = build("normuon")
    make_steps(module, optimizer, range(3))
    other, again = build("normuon")
    other.load_state_dict(module.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    make_steps(module, optimizer, range(3, 6))
    make_steps(other, again, range(3, 6))
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


@pytest.mark.parametrize("name", ["muonclip", "normuon"])
def test_a_step_that_is_left_out_keeps_every_bit_with_nesterov_and_decay(name: str) -> None:
    module, optimizer = build(name, nesterov=True)
    make_steps(module, optimizer, range(2))
    weights = {key: value.clone() for key, value in module.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for p, grad in zip(module.parameters(), gradients(module, 2)):
        p.grad = grad * torch.nan
    step_unless(optimizer, torch.tensor(True))
    assert all(torch.equal(value, weights[key]) for key, value in module.state_dict().items())
    for index, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[index][key]) for key, value in values.items())


def test_the_fused_weights_are_split_from_top_to_bottom() -> None:
    weight = torch.arange(12.0).view(6, 2)
    for name, firsts in (("qkv", [0, 4, 8]), ("gate_up", [0, 6]), ("out", [0])):
        matrices = list_matrices([weight.shape], [split_rows(f"layers.0.{name}.weight", 6)])
        assert [part[0, 0].item() for part in Owners(matrices).split([weight])] == firsts
        assert {m.rows for m in matrices} == {6 // len(firsts)}


def test_factors_of_a_matrix_of_16_rows_and_4_columns() -> None:
    found = {name: factor(16, 4) for name, factor in NORM_FACTORS.items()}
    assert found == {"spectral": 2.0, "match_rms_adamw": 0.8, "none": 1.0, "legacy_compat": 1.6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)])
def test_matrices_without_full_rank_and_zeros(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Zeros stay zeros beside others. In the directions that a matrix of rank 3 has the factor is the definition's, and
    what rounding lifts in the others, many times over, stays bounded."""
    torch.manual_seed(0)
    low = torch.randn(shape[0], 3) @ torch.randn(3, shape[1])
    found = orthogonalize(
        torch.stack([low, torch.zeros(shape)]), method="polar_express", num_steps=5, dtype=dtype
    ).double()
    assert not found[1].any()
    u, _, v = torch.linalg.svd(low.double(), full_matrices=False)
    wanted = reference_orthogonal(low.double(), "polar_express", 5)
    bound = 1e-3 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(u[:, :3].T @ found[0] @ v[:3].T, u[:, :3].T @ wanted @ v[:3].T, atol=bound, rtol=0)
    assert torch.linalg.svdvals(found[0]).max() < 1.3


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)])
@pytest.mark.parametrize("method", ORTHOGONALIZATIONS)
def test_products_equal_the_polynomials_of_the_singular_values(method: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, *shape, dtype=torch.float64)
    found = orthogonalize(stack, method=method, num_steps=5, dtype=torch.float64)
    for matrix, factor in zip(stack, found):
        torch.testing.assert_close(factor, reference_orthogonal(matrix, method, 5), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("method", "num_steps", "dtype", "low", "high"),
    [
        ("polar_express", 8, torch.float32, 0.99, 1.01),
        ("polar_express", 5, torch.float32, 0.5, 1.25),
        ("polar_express", 5, torch.bfloat16, 0.5, 1.25),
        ("newton_schulz", 5, torch.float32, 0.4, 1.25),
    ],
)
def test_singular_values_come_close_to_one(
    method: str, num_steps: int, dtype: torch.dtype, low: float, high: float
) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(
        orthogonalize(torch.randn(4, 64, 160), method=method, num_steps=num_steps, dtype=dtype)
    )
    assert low < values.min().item()
    assert values.max().item() < high


def test_the_scale_of_the_gradient_does_not_matter_and_zeros_stay_zeros() -> None:
    torch.manual_seed(0)
    stack = torch.randn(2, 8, 8)
    one, tiny = (orthogonalize(stack * c, method="polar_express", num_steps=5, dtype=torch.float32) for c in (1, 1e-15))
    torch.testing.assert_close(one, tiny)
    zeros = orthogonalize(torch.zeros(1, 4, 4), method="polar_express", num_steps=5, dtype=torch.float32)
    assert torch.equal(zeros, torch.zeros(1, 4, 4))


def test_the_last_coefficients_are_repeated() -> None:
    assert len(polar_express(3)) == 3
    assert polar_express(12)[7:] == [(1.875, -1.25, 0.375)] * 5


def test_rows_become_equally_large_and_the_matrix_keeps_its_size() -> None:
    updates = torch.tensor([[[3.0, 4.0], [0.3, 0.4]]])
    means = updates.square().mean(2, keepdim=True)
    even = updates * equal_row_scales(means, means)
    torch.testing.assert_close(even.norm(dim=2), (updates.norm() / 2**0.5).expand(1, 2))
    torch.testing.assert_close(even.norm(), updates.norm())
