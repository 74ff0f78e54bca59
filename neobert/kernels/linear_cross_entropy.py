"""Cross entropy of a vocabulary projection, summed over targets, without holding the logits.

    loss_sum = sum over m with targets[m] != ignore_index of logsumexp(W h_m) - (W h_m)[targets[m]]

`reference` is that formula with all `[M, V]` logits. `torch` goes through the tokens in chunks. The gradient of one
chunk needs nothing but its own logits:

    d loss / d logits = softmax(logits) - onehot(target)      (zero where the target is ignored)

so the forward computes d loss / d hidden and adds up d loss / d weight while the logits of a chunk are at hand, and the
backward only scales the two. No logits are kept and none are computed twice; the peak is one chunk, one gradient of the
size of the hidden states and one of the size of the weight, whatever M * V is.

Both honour autocast: the products run in its dtype. Logits, losses and sums over chunks are fp32.

Legend: M rows, D hidden size, V vocabulary, C rows of a chunk.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LinearCrossEntropy = Callable[..., tuple[Tensor, Tensor | None]]
"""`fn(hidden_MD, weight_VD, targets_M, *, ignore_index=-100, count_correct=False) -> (loss_sum, num_correct)`.

`targets_M` int64; `loss_sum` an fp32 scalar, exactly 0 with zero gradients when every target is ignored; `num_correct`
an int64 scalar, the number of targets that are the argmax of their logits, None unless asked for.
"""

CHUNK_BYTES = 64 * 2**20
"""fp32 logits of one chunk."""


def reference_linear_cross_entropy(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, *, ignore_index: int = -100, count_correct: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The definition; see LinearCrossEntropy. Keeps all logits for the backward."""
    logits_MV = F.linear(hidden_MD, weight_VD)
    logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    loss_sum = F.cross_entropy(logits_MV, targets_M, ignore_index=ignore_index, reduction="sum").float()
    num_correct = (logits_MV.argmax(dim=-1) == targets_M).sum() if count_correct else None
    return loss_sum, num_correct


def chunked_linear_cross_entropy(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, *, ignore_index: int = -100, count_correct: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The same in chunks; see LinearCrossEntropy. Raises RuntimeError in a second backward through one loss."""
    with_grad = torch.is_grad_enabled() and (hidden_MD.requires_grad or weight_VD.requires_grad)
    device_type = hidden_MD.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden_MD.dtype
    loss_sum, num_correct = _ChunkedLinearCrossEntropy.apply(
        hidden_MD, weight_VD, targets_M, ignore_index, count_correct, with_grad, dtype
    )
    return loss_sum, num_correct


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        targets_M: Tensor,
        ignore_index: int,
        count_correct: bool,
        with_grad: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        # Ignored rows become zero rows with target 0: whatever stands in them cannot reach a gradient.
        counted_M = targets_M != ignore_index
        targets_M = torch.where(counted_M, targets_M, 0)
        hidden = torch.where(counted_M[:, None], hidden_MD, 0).to(dtype)
        weight = weight_VD.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        losses_M = torch.zeros(hidden.shape[0], dtype=wide, device=hidden.device)
        num_correct = torch.zeros((), dtype=torch.int64, device=hidden.device) if count_correct else None
        grad_hidden = torch.zeros_like(hidden) if with_grad else None
        grad_weight = None
        chunk = max(1, CHUNK_BYTES // (wide.itemsize * weight.shape[0]))
        # One buffer for all chunks: on a CPU fresh pages cost more than the arithmetic on them.
        buffer_CV = torch.empty((min(chunk, hidden.shape[0]), weight.shape[0]), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk):
                rows = slice(start, start + chunk)
                hidden_CD, target_C1, counted_C1 = hidden[rows], targets_M[rows, None], counted_M[rows, None]
                logits_CV = buffer_CV[: hidden_CD.shape[0]].copy_(hidden_CD @ weight.T)
                if num_correct is not None:
                    num_correct += ((logits_CV.argmax(dim=-1, keepdim=True) == target_C1) & counted_C1).sum()
                shifted_CV = logits_CV.sub_(logits_CV.amax(dim=-1, keepdim=True))
                target_logit_C1 = shifted_CV.gather(1, target_C1)
                exp_CV = shifted_CV.exp_()
                sum_C1 = exp_CV.sum(dim=-1, keepdim=True)
                losses_M[rows] = torch.where(counted_C1, sum_C1.log() - target_logit_C1, 0)[:, 0]
                if grad_hidden is not None:
                    grad_CV = exp_CV.div_(sum_C1)
                    grad_CV = grad_CV.scatter_add_(1, target_C1, -torch.ones_like(sum_C1)).to(dtype)
                    grad_hidden[rows] = torch.where(counted_C1, grad_CV @ weight, 0)
                    part_VD = grad_CV.T @ hidden_CD
                    grad_weight = part_VD.to(wide) if grad_weight is None else grad_weight.add_(part_VD)
        ctx.grads = None
        if grad_hidden is not None and grad_weight is not None:
            ctx.grads = grad_hidden.to(hidden_MD.dtype), grad_weight.to(weight_VD.dtype)
        if num_correct is not None:
            ctx.mark_non_differentiable(num_correct)
        return losses_M.sum().float(), num_correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "linear_cross_entropy: a second backward through one loss, whose gradients were handed out by the "
                "first; compute the loss again"
            )
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None
        return grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss), None, None, None, None, None


KERNELS: dict[str, LinearCrossEntropy] = {
    "reference": reference_linear_cross_entropy,
    "torch": chunked_linear_cross_entropy,
}
"""All implementations of one function."""
