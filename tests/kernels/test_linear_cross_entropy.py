"""Every kernel of the table against the definition in double precision, and the memory that the chunked one needs."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton  # noqa: F401  without it the parity of the Triton kernel would silently go untested
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neobert.kernels import linear_cross_entropy, triton_linear_cross_entropy
from neobert.kernels.linear_cross_entropy import KERNELS, choose_kernel, kernel_problem

ROWS, HIDDEN, VOCAB = 23, 8, 40

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNNABLE = [name for name in KERNELS if kernel_problem(name, DEVICE) is None]
"""On a CPU the Triton kernel is among them, in the interpreter."""


@pytest.fixture(autouse=True)
def chunks_of_five_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fp32 logits, ten in bf16; two rows of a chunk go through the softmax together."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", {"cpu": 5 * 4 * VOCAB})
    monkeypatch.setattr(linear_cross_entropy, "TILE_BYTES", 2 * 4 * VOCAB)


def inputs(
    dtype: torch.dtype = torch.float32, *, rows: int = ROWS, hidden_size: int = HIDDEN, vocab: int = VOCAB
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight, and targets of which every third is ignored, a whole chunk among them."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, hidden_size, generator=generator, dtype=torch.float64)
    hidden, weight = (x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight))
    targets = torch.randint(0, vocab, (rows,), generator=generator).to(DEVICE)
    targets[2::3] = -100
    targets[5:10] = -100
    targets[0] = (hidden[0] @ weight.T).argmax()
    return hidden, weight, targets


def definition(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, z_loss: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of `scale` times the loss, in double precision."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    counted = targets != -100
    logits = (hidden @ weight.T)[counted]
    lse = logits.logsumexp(-1)
    loss = (lse - logits[torch.arange(len(logits)), targets[counted]] + z_loss * lse**2).sum()
    return (loss, *torch.autograd.grad(loss * scale, (hidden, weight)))


def test_the_kernels_that_must_be_tested_are() -> None:
    assert {"reference", "torch", "triton"} <= set(RUNNABLE)


SHAPES = {
    "whole blocks": (64, 32, 128),
    "ragged": (23, 7, 41),
    "one row": (1, 8, 40),
    "many tiles": (150, 40, 2100),
    "no rows": (0, 8, 40),
}
"""Rows, hidden size and vocabulary; the tiles of the Triton kernel have 64 rows and 64 columns in fp32."""


@pytest.mark.parametrize("z_loss", [0.0, 0.05])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", RUNNABLE)
def test_shapes_and_z_loss(name: str, shape: str, z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, hidden_size, vocab = SHAPES[shape]
    if rows == 0 and name == "liger":
        pytest.skip("liger divides by the number of rows")
    monkeypatch.setattr(triton_linear_cross_entropy, "CHUNK_BYTES", 4 * 150 * 900)  # several chunks of "many tiles"
    hidden, weight, targets = inputs(rows=rows, hidden_size=hidden_size, vocab=vocab) if rows else _nothing(vocab)
    loss, num_correct, z_sum = KERNELS[name](hidden, weight, targets, z_loss=z_loss, count_correct=True)
    (loss * 0.25).backward()
    for got, want in zip((loss, hidden.grad, weight.grad), definition(hidden, weight, targets, 0.25, z_loss)):
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)
    assert hidden.grad[targets == -100].eq(0).all()
    assert num_correct == ((hidden @ weight.T).argmax(-1) == targets).sum() >= min(rows, 1)
    if z_loss:
        assert not z_sum.requires_grad
        without = definition(hidden, weight, targets, 0.25, 0.0)[0]
        torch.testing.assert_close((loss - z_sum).detach().double(), without, atol=2e-5, rtol=2e-5)
    else:
        assert z_sum is None


def _nothing(vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.zeros(0, HIDDEN, device=DEVICE), torch.ones(vocab, HIDDEN, device=DEVICE)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.zeros(0, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("name", RUNNABLE)
def test_z_loss_pulls_the_logits_to_zero(name: str) -> None:
    """With one word in the vocabulary the cross entropy is 0, lse is the logit h w, and the loss is z (h w)^2."""
    hidden = torch.tensor([[1.5]], device=DEVICE, requires_grad=True)
    weight = torch.tensor([[2.0]], device=DEVICE, requires_grad=True)
    loss, *_ = KERNELS[name](hidden, weight, torch.zeros(1, dtype=torch.int64, device=DEVICE), z_loss=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(0.9)
    assert hidden.grad.item() == pytest.approx(2 * 0.1 * 3.0 * 2.0)
    assert weight.grad.item() == pytest.approx(2 * 0.1 * 3.0 * 1.5)


@pytest.mark.parametrize("name", RUNNABLE)
def test_loss_and_gradients(name: str) -> None:
    hidden, weight, targets = inputs()
    loss, num_correct, _ = KERNELS[name](hidden, weight, targets)
    (loss * 0.25).backward()
    assert num_correct is None
    assert loss.dtype == torch.float32
    assert loss.ndim == 0
    for got, want in zip((loss, hidden.grad, weight.grad), definition(hidden, weight, targets, 0.25)):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    assert hidden.grad[targets == -100].eq(0).all()


@pytest.mark.parametrize("name", RUNNABLE)
def test_under_bf16_autocast(name: str) -> None:
    hidden, weight, targets = inputs()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss, *_ = KERNELS[name](hidden, weight, targets)
    loss.backward()
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    want = definition(hidden, weight, targets, 1.0)
    assert loss.item() == pytest.approx(want[0].item(), rel=1e-2)
    assert loss.item() != pytest.approx(want[0].item(), rel=1e-7), "the products ran in bf16"
    for got, exact in zip((hidden.grad, weight.grad), want[1:]):
        assert (got - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("name", RUNNABLE)
def test_bf16_inputs_give_an_fp32_loss(name: str) -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    loss, *_ = KERNELS[name](hidden, weight, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(definition(hidden, weight, targets, 1.0)[0].item(), rel=1e-2)


@pytest.mark.parametrize("name", RUNNABLE)
def test_all_ignored_is_exactly_zero(name: str) -> None:
    hidden, weight, targets = inputs()
    loss, num_correct, _ = KERNELS[name](hidden, weight, torch.full_like(targets, -100), count_correct=True)
    loss.backward()
    assert loss.item() == 0
    assert num_correct.item() == 0
    assert hidden.grad.eq(0).all()
    assert weight.grad.eq(0).all()


@pytest.mark.parametrize("name", RUNNABLE)
def test_correct_predictions_are_counted(name: str) -> None:
    hidden, weight, targets = inputs()
    _, num_correct, _ = KERNELS[name](hidden, weight, targets, count_correct=True)
    expected = sum(int(t == (h @ weight.T).argmax()) for h, t in zip(hidden, targets) if t != -100)
    assert num_correct.dtype == torch.int64
    assert num_correct.item() == expected > 0


@pytest.mark.parametrize("name", RUNNABLE)
def test_another_ignore_index(name: str) -> None:
    hidden, weight, targets = inputs()
    loss, *_ = KERNELS[name](hidden, weight, targets)
    again, *_ = KERNELS[name](hidden, weight, torch.where(targets == -100, -1, targets), ignore_index=-1)
    assert torch.equal(loss, again)


@pytest.mark.parametrize("name", RUNNABLE)
def test_large_logits_do_not_overflow(name: str) -> None:
    hidden, weight, targets = inputs()
    loss, *_ = KERNELS[name](hidden * 1e4, weight, targets)
    assert loss.item() == pytest.approx(definition(hidden * 1e4, weight, targets, 1.0)[0].item(), rel=1e-4)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_what_is_in_ignored_rows_cannot_reach_a_gradient(name: str) -> None:
    hidden, weight, targets = inputs()
    poisoned = hidden.detach().clone()
    poisoned[targets == -100] = float("nan")
    poisoned.requires_grad_()
    loss, *_ = KERNELS[name](poisoned, weight, targets)
    loss.backward()
    assert loss.isfinite()
    assert poisoned.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_without_gradients_nothing_is_computed_for_them() -> None:
    hidden, weight, targets = inputs()
    with torch.no_grad(), _Shapes() as seen:
        loss, *_ = KERNELS["torch"](hidden, weight, targets)
    assert not loss.requires_grad
    assert sum(shape == weight.shape for shape in seen.made) == 0
    torch.testing.assert_close(loss.double(), definition(hidden, weight, targets, 1.0)[0])


def test_a_second_backward_is_an_error() -> None:
    hidden, weight, targets = inputs()
    loss, *_ = KERNELS["torch"](hidden, weight, targets)
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
    for name in ("reference", "torch"):
        with _Shapes() as seen, torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            loss, *_ = KERNELS[name](hidden, weight, targets, count_correct=True)
            loss.backward()
        largest[name] = max(shape.numel() for shape in seen.made)
        if name == "torch":
            assert not {op for op in seen.operators if "nonzero" in op or "_local_scalar_dense" in op}
    rows_of_a_chunk = 10 if bf16 else 5
    assert largest["torch"] <= max(rows_of_a_chunk * VOCAB, VOCAB * HIDDEN) < ROWS * VOCAB
    assert largest["reference"] == ROWS * VOCAB, "the definition holds all logits: the check can fail"


def test_memory_of_the_triton_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits have gradients for one chunk of the vocabulary at a time, here one tile of columns."""
    rows, vocab = 150, 2100
    monkeypatch.setattr(triton_linear_cross_entropy, "CHUNK_BYTES", 4 * rows * 64)
    hidden, weight, targets = inputs(rows=rows, vocab=vocab)
    with _Shapes() as seen:
        loss, *_ = KERNELS["triton"](hidden, weight, targets)
        loss.backward()
    # The interpreter copies tensors as bytes: four for each number of the weight.
    assert max(shape.numel() for shape in seen.made) <= 4 * vocab * HIDDEN < rows * vocab
    assert rows * 64 in {shape.numel() for shape in seen.made}


def test_a_second_backward_of_the_triton_kernel_is_the_first_again() -> None:
    hidden, weight, targets = inputs()
    loss, *_ = KERNELS["triton"](hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, (hidden, weight))):
        assert torch.equal(a, b)


def test_choice_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_kernel("auto", device=cpu) == choose_kernel("torch", device=cpu) == "torch"
    assert choose_kernel("auto", device=cuda) == choose_kernel("triton", device=cuda) == "triton"
    with pytest.raises(
        ValueError, match=r"model\.kernel_backend: 'triton' needs a CUDA device, .* on cpu: .*torch.*auto"
    ):
        choose_kernel("triton", device=cpu)
    with pytest.raises(ValueError, match=r"'cutlass' is unknown; write one of auto, reference, torch, triton, liger$"):
        choose_kernel("cutlass", device=cpu)
    monkeypatch.delitem(KERNELS, "triton")
    monkeypatch.delitem(KERNELS, "liger", raising=False)
    assert choose_kernel("auto", device=cuda) == "torch"
    for name, package in (("triton", "triton"), ("liger", "liger-kernel")):
        with pytest.raises(ValueError, match=f"model.kernel_backend: '{name}' .*run `pip install {package}`; or write"):
            choose_kernel(name, device=cuda)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from neobert.kernels import triton_linear_cross_entropy as kernels

WORDS = {"z_loss": "fp32", "lse_ptr": "*fp32", "scale_ptr": "*fp32", "targets_ptr": "*i32", "target_logit_ptr": "*fp32"}
WORDS |= {"max_ptr": "*fp32", "best_ptr": "*i32"}
for kernel in (kernels._reduce_kernel, kernels._gradient_kernel):
    tile = kernels.TILES[2]
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "PART": tile.part}
    constants |= {"EVEN": False, "COUNT": True, "PRECISION": "tf32", "WIDEN": False}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {name: WORDS.get(name, "*bf16" if "ptr" in name else "i32") for name in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    indices = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=indices)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, "wgmma" in done.asm["ptx"], done.metadata.shared <= 227 * 1024)
"""


def test_kernels_compile_for_a_gpu_without_one() -> None:
    """To matrix instructions of Hopper, within its shared memory; the interpreter checks neither."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "_reduce_kernel True True\n_gradient_kernel True True\n"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
def test_on_a_gpu_at_full_size(z_loss: float) -> None:
    """NeoBERT's vocabulary in bf16: close to the definition in fp32, with less memory than the chunked version."""
    rows, hidden_size, vocab = 13_000, 768, 30_592
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(rows, hidden_size, device="cuda", dtype=torch.bfloat16, generator=generator)
    weight = 0.02 * torch.randn(vocab, hidden_size, device="cuda", generator=generator)
    targets = torch.randint(0, vocab, (rows,), device="cuda", generator=generator)
    targets[-200:] = -100
    results, peaks = {}, {}
    for name in ("torch", "triton"):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            loss, num_correct, _ = KERNELS[name](h, w, targets, count_correct=True, z_loss=z_loss)
        loss.backward()
        peaks[name] = torch.cuda.max_memory_allocated() - before
        results[name] = (loss.detach(), h.grad, w.grad, num_correct)
    torch.set_float32_matmul_precision("highest")
    h, w = hidden.float().requires_grad_(), weight.bfloat16().float().requires_grad_()
    loss, num_correct, _ = KERNELS["reference"](h, w, targets, count_correct=True, z_loss=z_loss)
    loss.backward()
    assert results["triton"][0].item() == pytest.approx(loss.item(), rel=1e-5)
    for got, want in zip(results["triton"][1:3], (h.grad, w.grad)):
        assert ((got.float() - want).norm() / want.norm()).item() < 1e-2
    assert abs(results["triton"][3].item() - num_correct.item()) <= 2
    assert peaks["triton"] < peaks["torch"]


def test_gradients_reach_a_tied_embedding() -> None:
    """The weight is used twice: its gradient is the sum of both uses."""
    _, weight, targets = inputs()
    ids = torch.arange(ROWS, device=DEVICE)
    gradients = []
    for name in RUNNABLE:
        hidden = F.embedding(ids, weight).tanh()
        gradients.append(torch.autograd.grad(KERNELS[name](hidden, weight, targets)[0], weight)[0])
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


@pytest.mark.parametrize("z_loss", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_compiled_for_a_gpu_computes_the_same(
    dtype: torch.dtype, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and run without inductor, which would take long; chunks of two sizes, the last one short."""
    trace = torch.compile(linear_cross_entropy._losses_and_gradients_at_once, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(linear_cross_entropy, "_compiled_losses_and_gradients", lambda: trace)
    monkeypatch.setattr(linear_cross_entropy, "TILE_BYTES", 2**20)  # The other goes tile by tile on a CPU.
    found = []
    for kernel in (linear_cross_entropy.compiled_linear_cross_entropy, KERNELS["torch"]):
        hidden, weight, targets = inputs(dtype)
        loss, correct, z_sum = kernel(hidden, weight, targets, count_correct=True, z_loss=z_loss)
        loss.backward()
        found.append((loss.detach(), correct, z_sum if z_loss else loss.detach(), hidden.grad, weight.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*found, atol=tolerance, rtol=tolerance)


def test_a_loss_is_not_changed_by_one_that_uses_its_memory() -> None:
    """The second forward overwrites what the first had for its logits, before the backward of either."""
    torch.manual_seed(0)
    weight = torch.randn(30, 8)
    hidden = [torch.randn(count, 8) for count in (7, 12)]
    targets = [torch.arange(count) for count in (7, 12)]
    found = {}
    for name in ("torch", "reference"):
        leaves = [h.clone().requires_grad_() for h in hidden]
        losses = [KERNELS[name](h, weight, t)[0] for h, t in zip(leaves, targets)]
        for loss in losses:
            loss.backward()
        found[name] = [*(loss.detach() for loss in losses), *(h.grad for h in leaves)]
    for got, want in zip(found["torch"], found["reference"]):
        torch.testing.assert_close(got, want)
