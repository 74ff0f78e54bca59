"""Every kernel of the table against the definition in double precision, and the memory that the chunked one needs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neobert.kernels import linear_cross_entropy
from neobert.kernels.linear_cross_entropy import KERNELS

ROWS, HIDDEN, VOCAB = 23, 8, 40


@pytest.fixture(autouse=True)
def chunks_of_five_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 5 * 4 * VOCAB)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight, and targets of which every third is ignored, a whole chunk among them."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    targets[::3] = -100
    targets[5:10] = -100
    targets[1] = (hidden[1] @ weight.T).argmax()
    return hidden, weight, targets


def definition(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of `scale` times the loss, in double precision."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    counted = targets != -100
    log_probs = (hidden @ weight.T).log_softmax(-1)[counted]
    loss = -log_probs[torch.arange(len(log_probs)), targets[counted]].sum()
    return (loss, *torch.autograd.grad(loss * scale, (hidden, weight)))


@pytest.mark.parametrize("name", KERNELS)
def test_loss_and_gradients(name: str) -> None:
    hidden, weight, targets = inputs()
    loss, num_correct = KERNELS[name](hidden, weight, targets)
    (loss * 0.25).backward()
    assert num_correct is None
    assert loss.dtype == torch.float32
    assert loss.ndim == 0
    for got, want in zip((loss, hidden.grad, weight.grad), definition(hidden, weight, targets, 0.25)):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    assert hidden.grad[targets == -100].eq(0).all()


@pytest.mark.parametrize("name", KERNELS)
def test_under_bf16_autocast(name: str) -> None:
    hidden, weight, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = KERNELS[name](hidden, weight, targets)
    loss.backward()
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    want = definition(hidden, weight, targets, 1.0)
    assert loss.item() == pytest.approx(want[0].item(), rel=1e-2)
    assert loss.item() != pytest.approx(want[0].item(), rel=1e-7), "the products ran in bf16"
    for got, exact in zip((hidden.grad, weight.grad), want[1:]):
        assert (got - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("name", KERNELS)
def test_bf16_inputs_give_an_fp32_loss(name: str) -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    loss, _ = KERNELS[name](hidden, weight, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(definition(hidden, weight, targets, 1.0)[0].item(), rel=1e-2)


@pytest.mark.parametrize("name", KERNELS)
def test_all_ignored_is_exactly_zero(name: str) -> None:
    hidden, weight, targets = inputs()
    loss, num_correct = KERNELS[name](hidden, weight, torch.full_like(targets, -100), count_correct=True)
    loss.backward()
    assert loss.item() == 0
    assert num_correct.item() == 0
    assert hidden.grad.eq(0).all()
    assert weight.grad.eq(0).all()


@pytest.mark.parametrize("name", KERNELS)
def test_correct_predictions_are_counted(name: str) -> None:
    hidden, weight, targets = inputs()
    _, num_correct = KERNELS[name](hidden, weight, targets, count_correct=True)
    expected = sum(int(t == (h @ weight.T).argmax()) for h, t in zip(hidden, targets) if t != -100)
    assert num_correct.dtype == torch.int64
    assert num_correct.item() == expected > 0


@pytest.mark.parametrize("name", KERNELS)
def test_another_ignore_index(name: str) -> None:
    hidden, weight, targets = inputs()
    loss, _ = KERNELS[name](hidden, weight, targets)
    again, _ = KERNELS[name](hidden, weight, torch.where(targets == -100, -1, targets), ignore_index=-1)
    assert torch.equal(loss, again)


@pytest.mark.parametrize("name", KERNELS)
def test_large_logits_do_not_overflow(name: str) -> None:
    hidden, weight, targets = inputs()
    loss, _ = KERNELS[name](hidden * 1e4, weight, targets)
    assert loss.item() == pytest.approx(definition(hidden * 1e4, weight, targets, 1.0)[0].item(), rel=1e-4)


def test_what_stands_in_ignored_rows_cannot_reach_a_gradient() -> None:
    hidden, weight, targets = inputs()
    poisoned = hidden.detach().clone()
    poisoned[targets == -100] = float("nan")
    poisoned.requires_grad_()
    loss, _ = KERNELS["torch"](poisoned, weight, targets)
    loss.backward()
    assert loss.isfinite()
    assert poisoned.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_without_gradients_nothing_is_computed_for_them() -> None:
    hidden, weight, targets = inputs()
    with torch.no_grad(), _Shapes() as seen:
        loss, _ = KERNELS["torch"](hidden, weight, targets)
    assert not loss.requires_grad
    assert sum(shape == weight.shape for shape in seen.made) == 0
    torch.testing.assert_close(loss.double(), definition(hidden, weight, targets, 1.0)[0])


def test_a_second_backward_is_an_error() -> None:
    hidden, weight, targets = inputs()
    loss, _ = KERNELS["torch"](hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward through one loss.*compute the loss again"):
        loss.backward()


class _Shapes(TorchDispatchMode):
    """Records the shapes of all tensors that operators make, and the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Size] = []
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators.add(func.__name__)
        self.made += [x.shape for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor)]
        return out


@pytest.mark.parametrize("bf16", [False, True])
def test_memory_is_independent_of_rows_times_vocabulary(bf16: bool) -> None:
    hidden, weight, targets = inputs()
    largest = {}
    for name in KERNELS:
        with _Shapes() as seen, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = KERNELS[name](hidden, weight, targets, count_correct=True)
            loss.backward()
        largest[name] = max(shape.numel() for shape in seen.made)
        if name == "torch":
            assert not {op for op in seen.operators if "nonzero" in op or "_local_scalar_dense" in op}
    assert largest["torch"] <= max(5 * VOCAB, VOCAB * HIDDEN) < ROWS * VOCAB
    assert largest["reference"] == ROWS * VOCAB, "the definition holds all logits: the check can fail"


def test_gradients_reach_a_tied_embedding() -> None:
    """The weight is used twice: its gradient is the sum of both uses."""
    _, weight, targets = inputs()
    ids = torch.arange(ROWS)
    gradients = []
    for kernel in KERNELS.values():
        hidden = F.embedding(ids, weight).tanh()
        gradients.append(torch.autograd.grad(kernel(hidden, weight, targets)[0], weight)[0])
    torch.testing.assert_close(gradients[0], gradients[1])
