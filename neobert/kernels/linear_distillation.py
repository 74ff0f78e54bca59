"""How far the predictions of two vocabulary projections are apart, without holding the logits of either.

    kl_sum = T^2 sum over the counted m of sum_v p_v (log p_v - log q_v)
    p      = softmax(W' h'_m / T) of the teacher,  q = softmax(W h_m / T) of the student

The factor T^2 keeps the size of the gradient, whatever the temperature T (Hinton et al., arXiv 1503.02531, section 2).
The teacher has no gradients. Those of the student need nothing but the logits of a row, as in `linear_cross_entropy`:

    d kl_sum / d (W h_m) = T (q - p)      (zero where the row is not counted)

so the forward goes through the rows in chunks and leaves the gradients, and the backward only scales them.

All honour autocast: the products run in its dtype. Logits, losses and sums over chunks are fp32.

Legend: M rows, D width of the student, E width of the teacher, V vocabulary, C rows of a chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from neobert.kernels.linear_cross_entropy import CHUNK_BYTES


def reference_linear_kl(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    teacher_ME: Tensor,
    teacher_weight_VE: Tensor,
    counted_M: Tensor,
    *,
    temperature: float,
    count_agreed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The definition: `(kl_sum, num_agreed)`; keeps all logits of both.

    Args:
        counted_M: bool; other rows count 0 and have gradients of exactly 0.
        temperature: T.
        count_agreed: also the number of counted rows in which both have the same largest logit, an int64 scalar.
    """
    logits_MV = F.linear(hidden_MD, weight_VD)
    wide = torch.promote_types(logits_MV.dtype, torch.float32)
    logits_MV, taught_MV = logits_MV.to(wide), F.linear(teacher_ME, teacher_weight_VE).detach().to(wide)
    log_q_MV, log_p_MV = (F.log_softmax(x / temperature, dim=-1) for x in (logits_MV, taught_MV))
    kl_M = (log_p_MV.exp() * (log_p_MV - log_q_MV)).sum(dim=-1)
    num_agreed = None
    if count_agreed:
        num_agreed = ((logits_MV.argmax(dim=-1) == taught_MV.argmax(dim=-1)) & counted_M).sum()
    return temperature**2 * torch.where(counted_M, kl_M, 0).sum().float(), num_agreed


def chunked_linear_kl(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    teacher_ME: Tensor,
    teacher_weight_VE: Tensor,
    counted_M: Tensor,
    *,
    temperature: float,
    count_agreed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The same in chunks; see `reference_linear_kl`. Raises RuntimeError in a second backward through one loss."""
    with_grad = torch.is_grad_enabled() and (hidden_MD.requires_grad or weight_VD.requires_grad)
    device_type = hidden_MD.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden_MD.dtype
    kl_sum, num_agreed = _ChunkedLinearKL.apply(
        hidden_MD,
        weight_VD,
        teacher_ME.detach(),
        teacher_weight_VE.detach(),
        counted_M,
        temperature,
        count_agreed,
        with_grad,
        dtype,
    )
    return kl_sum, num_agreed


class _ChunkedLinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        teacher_ME: Tensor,
        teacher_weight_VE: Tensor,
        counted_M: Tensor,
        temperature: float,
        count_agreed: bool,
        with_grad: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        # Rows that are not counted become zero rows: whatever is in them cannot reach a gradient.
        hidden, taught = (torch.where(counted_M[:, None], x, 0).to(dtype) for x in (hidden_MD, teacher_ME))
        weight, teacher_weight = weight_VD.to(dtype), teacher_weight_VE.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        kl_M = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
        num_agreed = torch.zeros((), dtype=torch.int64, device=hidden.device) if count_agreed else None
        grad_hidden = torch.zeros_like(hidden) if with_grad else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if with_grad else None
        chunk = max(1, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"]) // (wide.itemsize * len(weight)))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                counted_C = counted_M[rows]
                logits_CV = (hidden[rows] @ weight.T).to(wide)
                taught_CV = (taught[rows] @ teacher_weight.T).to(wide)
                if num_agreed is not None:
                    agreed = (logits_CV.argmax(dim=-1) == taught_CV.argmax(dim=-1)) & counted_C
                    num_agreed = num_agreed + agreed.sum()  # not in place, since it leaves
                log_q_CV, log_p_CV = (_log_softmax_(x.div_(temperature)) for x in (logits_CV, taught_CV))
                p_CV = log_p_CV.exp()
                kl_C = log_p_CV.sub_(log_q_CV).mul_(p_CV).sum(dim=-1)
                kl_M[rows] = torch.where(counted_C, kl_C, 0)
                if grad_hidden is not None and grad_weight is not None:
                    factor_C = torch.where(counted_C, temperature, 0.0).to(wide)
                    gradient_CV = log_q_CV.exp_().sub_(p_CV).mul_(factor_C[:, None]).to(dtype)
                    torch.mm(gradient_CV, weight, out=grad_hidden[rows])
                    grad_weight.add_(gradient_CV.T @ hidden[rows])
        ctx.grads = None
        if grad_hidden is not None and grad_weight is not None:
            ctx.grads = grad_hidden.to(hidden_MD.dtype), grad_weight.to(weight_VD.dtype)
        if num_agreed is not None:
            ctx.mark_non_differentiable(num_agreed)
        # A copy: compiled by torch 2.11, what a cast to its own dtype returned has no gradient. See model/rotary.py.
        return (temperature**2 * kl_M.sum()).to(torch.float32, copy=True), num_agreed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "linear_kl: a second backward through one loss, whose gradients were handed out by the first; compute "
                "the loss again"
            )
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None
        return grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss), *(None,) * 7


def _log_softmax_(logits_CV: Tensor) -> Tensor:
    """In place, over the vocabulary."""
    return logits_CV.sub_(logits_CV.logsumexp(dim=-1, keepdim=True))
