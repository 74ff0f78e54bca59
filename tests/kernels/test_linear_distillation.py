"""The chunked divergence of two projections against its definition, forward and backward."""

import pytest
import torch
from torch import Tensor

from neobert.kernels import linear_distillation
from neobert.kernels.linear_distillation import chunked_linear_kl, reference_linear_kl

ROWS, VOCAB = 23, 40


@pytest.fixture(autouse=True)
def chunks_of_five_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_distillation, "CHUNK_BYTES", {"cpu": 5 * 4 * VOCAB})


def inputs(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> tuple[Tensor, ...]:
    """Student of width 8, teacher of width 12, and which rows count: not those of a whole chunk."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, 8), (VOCAB, 8), (rows, 12), (VOCAB, 12)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    counted = torch.arange(rows) % 3 != 2
    counted[5:10] = False
    return made[0].requires_grad_(), made[1].requires_grad_(), *made[2:], counted


def definition(given: tuple[Tensor, ...], temperature: float) -> tuple[float, float]:
    """One row and one token at a time, in double precision; and how many rows have the same first guess."""
    hidden, weight, taught, teacher_weight, counted = (x.detach().double() for x in given)
    total, agreed = 0.0, 0
    for m in torch.nonzero(counted).flatten().tolist():
        z, t = weight @ hidden[m], teacher_weight @ taught[m]
        q, p = (torch.exp(x / temperature) / torch.exp(x / temperature).sum() for x in (z, t))
        total += temperature**2 * sum(float(p[v] * torch.log(p[v] / q[v])) for v in range(VOCAB))
        agreed += int(z.argmax() == t.argmax())
    return total, agreed


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_gradients(temperature: float) -> None:
    given, same = inputs(), inputs(torch.float64)
    kl, agreed = chunked_linear_kl(*given, temperature=temperature, count_agreed=True)
    expected, expected_agreed = reference_linear_kl(*same, temperature=temperature, count_agreed=True)
    assert (expected.item(), expected_agreed) == (
        pytest.approx(definition(given, temperature)[0]),
        definition(given, temperature)[1],
    )
    assert kl.item() == pytest.approx(expected.item(), rel=1e-5)
    assert agreed == expected_agreed
    (kl * 0.25).backward()
    (expected * 0.25).backward()
    for got, want in zip(given[:2], same[:2]):
        torch.testing.assert_close(got.grad.double(), want.grad, atol=1e-5, rtol=1e-5)
    assert given[0].grad[~given[4]].eq(0).all()
    assert all(x.grad is None for x in given[2:4])


def test_what_is_not_counted_reaches_nothing() -> None:
    given = inputs()
    with torch.no_grad():
        given[2][5:10] = float("nan")
    kl, none = chunked_linear_kl(*given, temperature=2.0)
    kl.backward()
    assert none is None
    assert kl.isfinite()
    assert all(x.grad.isfinite().all() for x in given[:2])
    empty = inputs(rows=0)
    kl, _ = chunked_linear_kl(*empty, temperature=2.0)
    kl.backward()
    assert (kl.item(), empty[1].grad.abs().sum().item()) == (0.0, 0.0)


def test_equal_predictions_have_no_divergence() -> None:
    hidden, weight, *_, counted = inputs()
    kl, agreed = chunked_linear_kl(
        hidden, weight, hidden.detach(), weight.detach(), counted, temperature=1.0, count_agreed=True
    )
    assert kl.item() == pytest.approx(0.0, abs=1e-5)
    assert agreed == counted.sum()


def test_autocast_and_a_second_backward() -> None:
    given = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        kl, _ = chunked_linear_kl(*given, temperature=2.0)
    assert kl.dtype == torch.float32
    assert kl.item() == pytest.approx(reference_linear_kl(*given, temperature=2.0)[0].item(), rel=0.05)
    kl.backward(retain_graph=True)
    assert given[0].grad.dtype == torch.float32
    with pytest.raises(RuntimeError, match="a second backward"):
        kl.backward()
    with torch.no_grad():
        assert not chunked_linear_kl(*given, temperature=2.0)[0].requires_grad
