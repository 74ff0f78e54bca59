"""`trainer.fp8`: products in fp8 against their definition, and one graph for a block."""

from typing import Any

import pytest
import torch
from packed import pack
from torch import Tensor

from neobert.benchmark.ledger import measure_ledger
from neobert.benchmark.settings import StepSettings
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.fp8 import Fp8Linear, emulate, fp8_linear, fp8_problem, quantise, scaled_product, use_fp8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def operands(tokens: int = 40, inputs: int = 64, outputs: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, weight and gradient of a layer, of which rows differ in size."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(s, generator=generator) for s in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    sizes = torch.logspace(-0.5, 0.5, tokens)[:, None]
    return (x * sizes).bfloat16(), (0.02 * weight).bfloat16(), (grad / sizes).bfloat16()


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(("dtype", "step"), [(E4M3, 2**-4), (E5M2, 2**-3)])
def test_a_row_comes_back_to_half_a_step_of_its_numbers(dtype: torch.dtype, step: float) -> None:
    x = operands()[0]
    x[3] = 0
    values, scale = quantise(x, dtype)
    back = values.float() * scale
    assert values.is_contiguous()
    assert torch.equal(back[3], torch.zeros(64))
    largest = x.float().abs().amax(1, keepdim=True)
    assert ((back - x.float()).abs() <= step * x.float().abs() + 2**-16 * largest).all()
    assert torch.equal(values.float().abs().amax(1)[[0, 39]], torch.full((2,), torch.finfo(dtype).max))


@pytest.mark.parametrize("tokens", [48, 40])
def test_output_and_gradients_are_products_of_rounded_operands(tokens: int) -> None:
    x, weight, grad = operands(tokens)
    x.requires_grad_()
    weight.requires_grad_()
    y = fp8_linear(x, weight, emulate)
    grads = torch.autograd.grad(y, (x, weight), grad)

    def rounded(tensor: Tensor) -> Tensor:
        values, scale = quantise(tensor.detach())
        return values.double() * scale.double()

    expected = {
        "y": rounded(x) @ rounded(weight).T,
        "d x": rounded(grad) @ rounded(weight.T).T,
        "d W": rounded(grad.T) @ rounded(x.T).T,
    }
    for name, found in zip(expected, (y, *grads)):
        assert found.dtype == torch.bfloat16
        assert relative(found, expected[name]) < 2**-8, name
    plain = {"y": x @ weight.T, "d x": grad @ weight, "d W": grad.T @ x}
    for name, found in zip(plain, (y, *grads)):
        assert 0.005 < relative(found, plain[name].detach()) < 0.06, name


def test_e5m2_is_coarser_for_gradients_that_have_a_scale_a_row() -> None:
    x, weight, grad = operands()
    errors = []
    for dtype in (E4M3, E5M2):
        own = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(fp8_linear(own, weight, emulate, dtype), own, grad)
        errors.append(relative(found, grad @ weight))
    assert errors[0] < 0.75 * errors[1]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_product_of_torch_gets_what_it_takes(dtype: torch.dtype) -> None:
    """On a CPU torch has a form of it in some releases, with the same operands, layouts and scales."""
    x, weight, _ = operands(48)
    given = (*quantise(x, dtype), *quantise(weight))
    try:
        found = scaled_product(*given)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"this torch has no such product here: {str(error)[:60]}")
    assert relative(found, emulate(*given)) < 2**-8
    assert found.dtype == torch.bfloat16


def test_a_block_keeps_its_weights_and_names() -> None:
    for act, layers in (("swiglu", {"qkv", "gate_up", "down"}), ("gelu", {"qkv", "up", "down"})):
        encoder = Encoder(small_config(hidden_act=act), ATTENTION["sdpa"])
        before = dict(encoder.named_parameters())
        use_fp8(encoder, emulate)
        assert {name for name, part in encoder.layers[1].named_children() if isinstance(part, Fp8Linear)} == layers
        after = dict(encoder.named_parameters())
        assert list(after) == list(before)
        assert all(after[name] is before[name] for name in before)


def small_config(**more: Any) -> ModelConfig:
    return ModelConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        vocab_size=40,
        pad_token_id=0,
        **more,
    )


def test_the_product_of_a_gpu_gets_shapes_and_layouts_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the first operand and columns of the second are contiguous, all sizes are multiples of 16; 40 tokens."""
    shapes: list[tuple[int, ...]] = []

    def multiply(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert a.is_contiguous()
        assert b.T.is_contiguous()
        assert scale_a.shape == (len(a), 1)
        assert scale_b.shape == (1, b.shape[1])
        assert scale_b.is_contiguous()
        assert not any(size % 16 for size in (a.shape[1], *b.shape))
        shapes.append((*a.shape, b.shape[1]))
        return emulate(a, scale_a, b.T, scale_b.T).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", multiply)
    encoder = Encoder(small_config(), ATTENTION["sdpa"]).bfloat16()
    use_fp8(encoder, scaled_product)
    positions, segments = pack([(8, 12), (20,)], 20)
    encoder(torch.zeros(2, 20, dtype=torch.int32), positions, segments).float().sum().backward()
    layers = [(32, 96), (32, 64), (32, 32)]
    assert shapes[:3] == [(40, inner, outer) for inner, outer in layers], "qkv, gate_up, down"
    assert shapes[6:8] == [(40, 32, 32), (32, 48, 32)], "gradients of down's input and weight: tokens filled up to 48"
    assert len(shapes) == 2 * 3 * 3


@pytest.mark.parametrize("residual", [False, True])
def test_a_compiled_block_is_one_graph(residual: bool) -> None:
    """On fake tensors, as a GPU would get them: nothing is in the compiler's way."""
    tiny = StepSettings(preset="tiny", rows=2, length=64, vocab_size=300, bf16_residual=residual, fp8="rowwise")
    assert measure_ledger(tiny).graphs_per_block == 1


@pytest.mark.parametrize(("capability", "runs"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_the_gpus_that_have_such_products(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    problem = fp8_problem(torch.device("cuda"))
    assert (problem is None) == runs
    assert runs or problem == "needs compute capability 8.9 or later, and A100 has 8.0"
