"""Cross entropy of a vocabulary projection, summed over targets, without holding the logits.

    loss_sum = sum over m with targets[m] != ignore_index of lse_m - (W h_m)[targets[m]] + z lse_m^2
    lse_m    = logsumexp(W h_m)

The last term is the z-loss (PaLM, arXiv 2204.02311, section 5): with a small z it keeps the logits from drifting, and
with z = 0 it is left out. `reference` is that formula with all `[M, V]` logits. `torch` goes through the tokens in
chunks. The gradient of one chunk needs nothing but its own logits:

    d loss / d logits = softmax(logits) (1 + 2 z lse) - onehot(target)      (zero where the target is ignored)

so the forward computes d loss / d hidden and adds up d loss / d weight while the logits of a chunk are at hand, and the
backward only scales the two. No logits are kept and none are computed twice; the peak is one chunk, one gradient of the
size of the hidden states and one of the size of the weight, whatever M * V is. `triton` and `liger` are kernels for
CUDA devices, see their modules.

All honour autocast: the products run in its dtype. Logits, losses and sums over chunks are fp32.

Legend: M rows, D hidden size, V vocabulary, C rows of a chunk.
"""

import math
import os
import threading
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    from neobert.kernels.triton_linear_cross_entropy import triton_linear_cross_entropy as _triton
except ImportError:
    _triton = None  # type: ignore[assignment]
try:
    from neobert.kernels.liger_linear_cross_entropy import liger_linear_cross_entropy as _liger
except ImportError:
    _liger = None  # type: ignore[assignment]

LinearCrossEntropy = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
"""`fn(hidden_MD, weight_VD, targets_M, *, ignore_index=-100, count_correct=False, z_loss=0.0)` to
`(loss_sum, num_correct, z_sum)`.

`targets_M` int64; `z_loss` is the coefficient z; `loss_sum` an fp32 scalar, exactly 0 with zero gradients when every
target is ignored; `num_correct` an int64 scalar, the number of targets that are the argmax of their logits, None unless
asked for; `z_sum` the part of `loss_sum` that is z-loss, an fp32 scalar without gradient, None with z = 0.
"""

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Logits of one chunk, in the dtype of the products, by the kind of device; others as a CPU. It takes many rows to keep
a GPU busy."""

TILE_BYTES = 2 * 2**20
"""fp32 logits of the rows that go through the softmax together on a CPU: they stay in its cache."""


def reference_linear_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    *,
    ignore_index: int = -100,
    count_correct: bool = False,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The definition; see LinearCrossEntropy. Keeps all logits for the backward."""
    logits_MV = F.linear(hidden_MD, weight_VD)
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    loss_sum = F.cross_entropy(logits_MV, targets_M, ignore_index=ignore_index, reduction="sum").float()
    z_sum = None
    if z_loss:
        lse_M = torch.where(targets_M != ignore_index, logits_MV.logsumexp(dim=-1), 0)
        z_sum = z_loss * lse_M.square().sum().float()
        loss_sum = loss_sum + z_sum
    num_correct = (logits_MV.argmax(dim=-1) == targets_M).sum() if count_correct else None
    return loss_sum, num_correct, None if z_sum is None else z_sum.detach()


def chunked_linear_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    *,
    ignore_index: int = -100,
    count_correct: bool = False,
    z_loss: float = 0.0,
    compiled: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same in chunks; see LinearCrossEntropy. Raises RuntimeError in a second backward through one loss.

    Args:
        compiled: fuses what becomes of the logits of a chunk into few passes over them, for a GPU.
    """
    with_grad = torch.is_grad_enabled() and (hidden_MD.requires_grad or weight_VD.requires_grad)
    device_type = hidden_MD.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden_MD.dtype
    loss_sum, num_correct, z_sum = _ChunkedLinearCrossEntropy.apply(
        hidden_MD, weight_VD, targets_M, ignore_index, count_correct, z_loss, with_grad, dtype, compiled
    )
    return loss_sum, num_correct, z_sum


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        targets_M: Tensor,
        ignore_index: int,
        count_correct: bool,
        z_loss: float,
        with_grad: bool,
        dtype: torch.dtype,
        compiled: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        chunk_losses = _compiled_losses_and_gradients() if compiled else _losses_and_gradients
        # Ignored rows become zero rows with target 0: whatever is in them cannot reach a gradient.
        counted_M = targets_M != ignore_index
        target_M1 = torch.where(counted_M, targets_M, 0)[:, None]
        hidden = torch.where(counted_M[:, None], hidden_MD, 0).to(dtype)
        weight = weight_VD.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        losses_M = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
        z_sums: list[Tensor] = []
        num_correct = torch.zeros((), dtype=torch.int64, device=hidden.device) if count_correct else None
        grad_hidden = torch.zeros_like(hidden) if with_grad else None
        grad_weight = None
        chunk = max(1, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"]) // (dtype.itemsize * len(weight)))
        shape_CV = min(chunk, len(hidden)), len(weight)
        most = CHUNK_BYTES["cpu"] // dtype.itemsize
        if hidden.device.type == "cpu" and not torch.compiler.is_compiling() and math.prod(shape_CV) <= most:
            buffer_CV = _chunk_memory(most, dtype, threading.get_ident())[: math.prod(shape_CV)].view(shape_CV)
        else:
            buffer_CV = hidden.new_empty(shape_CV)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                hidden_CD, target_C1, counted_C1 = hidden[rows], target_M1[rows], counted_M[rows, None]
                logits_CV = torch.mm(hidden_CD, weight.T, out=buffer_CV[: len(hidden_CD)])
                if num_correct is not None:
                    hits = (logits_CV.argmax(dim=-1, keepdim=True) == target_C1) & counted_C1
                    num_correct = num_correct + hits.sum()  # not in place, since it leaves
                losses_M[rows], lse_C = chunk_losses(logits_CV, target_C1, counted_C1, z_loss, with_grad)
                if z_loss:
                    z_sums.append(z_loss * torch.where(counted_M[rows], lse_C, 0).square().sum())
                if grad_hidden is not None:  # What was logits is gradients now.
                    torch.mm(logits_CV, weight, out=grad_hidden[rows])
                    if grad_weight is None:
                        grad_weight = (logits_CV.T @ hidden_CD).to(wide)
                    elif dtype == wide:
                        grad_weight.addmm_(logits_CV.T, hidden_CD)
                    else:
                        grad_weight.add_(logits_CV.T @ hidden_CD)
        ctx.grads = None
        if grad_hidden is not None:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight  # None without rows
            ctx.grads = grad_hidden.to(hidden_MD.dtype), grad_weight.to(weight_VD.dtype)
        if num_correct is not None:
            ctx.mark_non_differentiable(num_correct)
        # A copy: compiled by torch 2.11, what a cast to its own dtype returned has no gradient. See model/rotary.py.
        z_sum = torch.stack(z_sums or [losses_M.new_zeros(())]).sum().to(torch.float32, copy=True) if z_loss else None
        if z_sum is not None:
            ctx.mark_non_differentiable(z_sum)
        return losses_M.sum().to(torch.float32, copy=True), num_correct, z_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "linear_cross_entropy: a second backward through one loss, whose gradients were handed out by the "
                "first; compute the loss again"
            )
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None
        return grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss), *(None,) * 7


@cache
def _chunk_memory(count: int, dtype: torch.dtype, thread: int) -> Tensor:
    """Memory of a thread for the logits of a chunk on a CPU, kept for all steps: fresh pages cost more than half as
    much as the product that fills them."""
    with torch.inference_mode(False):
        return torch.empty(count, dtype=dtype)


def _losses_and_gradients(
    logits_CV: Tensor, target_C1: Tensor, counted_C1: Tensor, z_loss: float, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Losses `[C]` of a chunk, 0 where ignored, and logsumexp; with `with_grad` the logits are overwritten by their
    gradients.

    On a CPU rows go in tiles that stay in its cache, so that one pass over the memory of the chunk serves all the
    operations. Exponentials and sums are fp32 at least.
    """
    rows, vocabulary = logits_CV.shape
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    tile = max(1, TILE_BYTES // (wide.itemsize * vocabulary)) if logits_CV.device.type == "cpu" else rows
    buffer = None
    if wide != logits_CV.dtype:
        buffer = torch.empty((min(tile, rows), vocabulary), dtype=wide, device=logits_CV.device)
    losses_C1, lse_C1 = torch.empty((2, rows, 1), dtype=wide, device=logits_CV.device)
    for start in range(0, rows, tile):
        part = slice(start, start + tile)
        logits, target, counted = logits_CV[part], target_C1[part], counted_C1[part]
        wide_logits = logits if buffer is None else buffer[: len(logits)].copy_(logits)
        largest = wide_logits.amax(dim=-1, keepdim=True)
        shifted = wide_logits.sub_(largest)
        target_logit = shifted.gather(1, target)
        exp = shifted.exp_()
        total = exp.sum(dim=-1, keepdim=True)
        log_total = total.log()
        lse = torch.add(largest, log_total, out=lse_C1[part])
        losses_C1[part] = torch.where(counted, log_total - target_logit + z_loss * lse.square(), 0)
        if with_grad:
            gradient = exp.mul_(torch.where(counted, (1 + 2 * z_loss * lse) / total, 0))
            gradient.scatter_add_(1, target, -counted.to(wide))
            if buffer is not None:
                logits.copy_(gradient)
    return losses_C1[:, 0], lse_C1[:, 0]


def _losses_and_gradients_at_once(
    logits_CV: Tensor, target_C1: Tensor, counted_C1: Tensor, z_loss: float, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """The same as `_losses_and_gradients`, written for a compiler: nothing of the size of the logits is kept."""
    wide_logits = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    lse = wide_logits.logsumexp(dim=-1, keepdim=True)
    losses_C1 = torch.where(counted_C1, lse - wide_logits.gather(1, target_C1) + z_loss * lse.square(), 0)
    if with_grad:
        probs = torch.exp(wide_logits - lse) * (1 + 2 * z_loss * lse)
        is_target = torch.arange(logits_CV.shape[1], device=logits_CV.device) == target_C1
        logits_CV.copy_(torch.where(counted_C1, probs - is_target.to(probs.dtype), 0))
    return losses_C1[:, 0], lse[:, 0]


@cache
def _compiled_losses_and_gradients() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_losses_and_gradients_at_once)


compiled_linear_cross_entropy: LinearCrossEntropy = partial(chunked_linear_cross_entropy, compiled=True)
"""The kernel `torch` on a GPU, in a run whose blocks are compiled."""

KERNELS: dict[str, LinearCrossEntropy] = {
    "reference": reference_linear_cross_entropy,
    "torch": chunked_linear_cross_entropy,
}
"""All implementations of one function that can be imported here."""

if _triton is not None:
    KERNELS["triton"] = _triton
if _liger is not None:
    KERNELS["liger"] = _liger

PACKAGES = {"triton": "triton", "liger": "liger-kernel"}
"""What the kernels for CUDA devices need, by the name that pip knows."""


def kernel_problem(name: str, device: torch.device) -> str | None:
    """Why a kernel cannot run on a device; None when it can. Triton's interpreter replaces a CUDA device."""
    if name not in PACKAGES:
        return None
    if name not in KERNELS:
        return f"needs the package {PACKAGES[name]}: run `pip install {PACKAGES[name]}`"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a CUDA device, and this run computes on {device.type}: write model.kernel_backend: torch"
    return None


def choose_kernel(name: str, *, device: torch.device) -> str:
    """The key of KERNELS for `model.kernel_backend`: `auto` takes triton on CUDA where it can be imported, else torch.

    Raises ValueError for an unknown name and for a named kernel that cannot run here.
    """
    if name == "auto":
        return "triton" if device.type == "cuda" and kernel_problem("triton", device) is None else "torch"
    if name not in KERNELS and name not in PACKAGES:
        known = ", ".join(("auto", *KERNELS, *(x for x in PACKAGES if x not in KERNELS)))
        raise ValueError(f"model.kernel_backend: {name!r} is unknown; write one of {known}")
    if (problem := kernel_problem(name, device)) is not None:
        raise ValueError(f"model.kernel_backend: {name!r} {problem}; or write model.kernel_backend: auto")
    return name
