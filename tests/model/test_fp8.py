"""`trainer.fp8`: products in fp8 against their definition, what is refused, and one graph for a block."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neobert.benchmark.ledger import measure_ledger
from neobert.benchmark.settings import StepSettings
from neobert.config.load import ConfigError
from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.model import fp8
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.fp8 import (
    FP8_PRODUCTS,
    Fp8Linear,
    emulate,
    fp8_linear,
    fp8_problem,
    quantise,
    scaled_product,
    use_fp8,
)
from neobert.train import machine
from neobert.train.loop import pretrain

Tiny = Callable[..., Config]
ON = ("trainer.mixed_precision=bf16", "trainer.fp8=emulated")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def operands(tokens: int = 40, inputs: int = 64, outputs: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, weight and gradient of a layer, of which rows differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(s, generator=generator) for s in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    sizes = torch.logspace(-6, 2, tokens)[:, None]
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
        config = ModelConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, hidden_act=act,
            max_position_embeddings=16, vocab_size=40, pad_token_id=0,
        )  # fmt: skip
        encoder = Encoder(config, ATTENTION["sdpa"])
        before = dict(encoder.named_parameters())
        use_fp8(encoder, emulate)
        assert {name for name, part in encoder.layers[1].named_children() if isinstance(part, Fp8Linear)} == layers
        after = dict(encoder.named_parameters())
        assert list(after) == list(before)
        assert all(after[name] is before[name] for name in before)


@pytest.mark.parametrize("residual", [False, True])
def test_a_compiled_block_is_one_graph_whose_products_are_scaled(residual: bool) -> None:
    """On fake tensors, as a GPU would get them: nothing is in the compiler's way, and the product takes all shapes."""
    tiny = StepSettings(preset="tiny", rows=2, length=64, vocab_size=300, bf16_residual=residual, fp8="rowwise")
    calls: list[tuple[int, ...]] = []
    right = torch._scaled_mm

    def count(a: Tensor, b: Tensor, **settings: Any) -> Tensor:
        assert a.is_contiguous()
        assert b.T.is_contiguous()
        assert not any(size % 16 for size in (*a.shape, *b.shape))
        calls.append((*a.shape, b.shape[1]))
        return right(a, b, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_scaled_mm", count)
        ledger = measure_ledger(tiny)
    assert ledger.graphs_per_block == 1
    tokens, layers = 2 * 64, 2
    eager = calls[: layers * 3 * 3]
    assert eager[:3] == [(tokens, 32, 96), (tokens, 32, 64), (tokens, 32, 32)], "qkv, gate_up, down, forward"


def test_an_emulated_run_resumes_bit_for_bit_and_differs_from_bf16(tiny: Tiny, tmp_path: Path) -> None:
    from records import exact_steps, log_lines

    whole, parts, plain = tmp_path / "whole", tmp_path / "parts", tmp_path / "plain"
    keys = ["trainer.max_steps=8", "trainer.ema_decay=0.9"]
    pretrain(tiny(whole, *keys, *ON, "trainer.bf16_residual=true"))
    resume = f"trainer.resume_from_checkpoint={whole / 'checkpoints' / '4'}"
    pretrain(tiny(parts, *keys, *ON, "trainer.bf16_residual=true", resume))
    assert exact_steps(parts) == exact_steps(whole, after=4)
    pretrain(tiny(plain, *keys, ON[0]))
    with pytest.raises(StartupError, match=r"trainer.fp8 +needs declaring"):
        pretrain(tiny(tmp_path / "other", *keys, ON[0], resume))
    losses = [torch.tensor([line["loss"] for line in log_lines(run, "step")]) for run in (whole, plain)]
    assert 0 < ((losses[0] - losses[1]).abs() / losses[1]).max() < 0.02


def test_what_cannot_run_in_fp8_is_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"trainer.fp8: emulated has no effect .*write trainer.mixed_precision: bf16"):
        tiny(tmp_path, ON[1])
    with pytest.raises(ConfigError, match=r"model.hidden_size: 40 is no multiple of 16.*write trainer.fp8: no"):
        tiny(tmp_path, *ON, "model.hidden_size=40")
    with pytest.raises(ConfigError, match=r"model.intermediate_size: 60, a feed-forward width of 40, is no multiple"):
        tiny(tmp_path, *ON, "model.intermediate_size=60")
    with pytest.raises(StartupError, match=r"trainer.fp8: rowwise needs .*computes on cpu; write no, or emulated"):
        pretrain(tiny(tmp_path / "run", ON[0], "trainer.fp8=rowwise", "trainer.device=cpu"))
    assert not (tmp_path / "run").exists()
    assert set(FP8_PRODUCTS) == {"rowwise", "emulated"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    assert "needs compute capability 8.9 or later, and A100 has 8.0" in str(fp8_problem(torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fp8_problem(torch.device("cuda")) is None
    assert machine.fp8_problem is fp8.fp8_problem
