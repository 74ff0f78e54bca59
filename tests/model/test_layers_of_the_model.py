"""Norms and rotary positions against their definitions."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neobert.model.layers import LayerNorm, RMSNorm, geglu, swiglu
from neobert.model.rotary import apply_rotary, rotary_table


def definition(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, RMSNorm):
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
    assert isinstance(norm, LayerNorm)
    return F.layer_norm(x, norm.weight.shape, norm.weight, None, norm.eps)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norm_and_its_gradients(kind: type[RMSNorm] | type[LayerNorm]) -> None:
    norm = kind(16, 1e-3)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(7, 16, requires_grad=True)
    grad = torch.randn(7, 16)
    got = torch.autograd.grad(norm(x), (x, norm.weight), grad)
    want = torch.autograd.grad(definition(norm, x), (x, norm.weight), grad)
    torch.testing.assert_close(norm(x), definition(norm, x))
    torch.testing.assert_close(got, want)
    assert norm(torch.zeros(2, 16)).eq(0).all(), "a row of zeros is no division by zero"


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norm_takes_bf16_with_fp32_weights(kind: type[RMSNorm] | type[LayerNorm]) -> None:
    norm = kind(16, 1e-5)
    x = torch.randn(4, 16).bfloat16().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = norm(x)
        out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert norm.weight.grad is not None
    assert norm.weight.grad.dtype == torch.float32
    torch.testing.assert_close(out, definition(norm, x.float()).bfloat16())


def test_swiglu_and_its_gradient() -> None:
    gate_up = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(gate_up), gate * torch.sigmoid(gate) * up)
    assert torch.autograd.gradcheck(swiglu, (gate_up,))


def test_geglu_and_its_gradient() -> None:
    """The gate comes first, and its GELU is the exact one."""
    gate_up = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(geglu(gate_up), gate * (1 + torch.erf(gate / 2**0.5)) / 2 * up)
    assert torch.autograd.gradcheck(geglu, (gate_up,))


def test_swiglu_in_bf16_is_the_plain_formula_bit_for_bit() -> None:
    gate_up = torch.randn(33, 24).bfloat16().requires_grad_()
    grad = torch.randn(33, 12).bfloat16()
    gate, up = gate_up.chunk(2, dim=-1)
    want = F.silu(gate) * up
    got = swiglu(gate_up)
    assert got.equal(want)
    assert torch.autograd.grad(got, gate_up, grad)[0].equal(torch.autograd.grad(want, gate_up, grad)[0])


def test_rotation_by_hand() -> None:
    """One plane of a head of two: (1, 0) at position p becomes (cos p, sin p); halves, not neighbours, are paired."""
    cos, sin = rotary_table(torch.tensor([0, 1, 2], dtype=torch.int32), 2, 10000.0)
    turned = apply_rotary(torch.tensor([1.0, 0.0]).expand(3, 1, 2), cos, sin)
    angles = torch.tensor([0.0, 1.0, 2.0])
    torch.testing.assert_close(turned[:, 0], torch.stack((angles.cos(), angles.sin()), dim=1))
    cos, sin = rotary_table(torch.tensor([1]), 4, 100.0)
    turned = apply_rotary(torch.tensor([[[1.0, 1.0, 0.0, 0.0]]]), cos, sin)
    slow = torch.tensor(0.1)  # 100 ** (-2 / 4)
    expected = torch.stack((torch.tensor(1.0).cos(), slow.cos(), torch.tensor(1.0).sin(), slow.sin()))
    torch.testing.assert_close(turned[0, 0], expected)


def test_products_depend_on_the_difference_of_positions() -> None:
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)

    def product(at_q: int, at_k: int) -> float:
        tables = (rotary_table(torch.tensor([p]), 8, 10000.0) for p in (at_q, at_k))
        turned_q, turned_k = (apply_rotary(x, *table) for x, table in zip((q, k), tables))
        return (turned_q * turned_k).sum().item()

    assert product(3, 1) == pytest.approx(product(503, 501), abs=1e-4)
    assert product(3, 1) != pytest.approx(product(4, 1), abs=1e-4)


def test_rotation_gradient_and_dtype() -> None:
    cos, sin = (x.double() for x in rotary_table(torch.arange(5), 6, 100.0))
    x = torch.randn(5, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: apply_rotary(y, cos, sin), (x,))
    narrow = apply_rotary(x.bfloat16(), cos.float(), sin.float())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow, apply_rotary(x.bfloat16().double(), cos, sin).bfloat16())
