"""Attention document by document on a CPU in fp32, with the kernel of torch's scaled_dot_product_attention.

It never writes scores to memory, and keeps a logsumexp for each query and head. In fp32 it takes about three quarters
of the time of plain products; in bf16 its backward takes twice as long as they do, see `segmented`.

Legend: T tokens of the flat stream, N heads, D head size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def is_fused(q_TND: Tensor, slots: Tensor, reach: int) -> bool:
    """Whether torch's kernel computes the documents: it knows no window, and `slots` are those of buckets."""
    return q_TND.dtype == torch.float32 and not len(slots) and reach < 0


def empty_logsumexps(q_TND: Tensor, *, fused: bool) -> Tensor:
    """Memory for what the kernel keeps for its backward: `[N, T]`, or `[N, 0]` where it is not used."""
    num_tokens, num_heads = q_TND.shape[:2]
    return q_TND.new_empty((num_heads, num_tokens if fused else 0), dtype=torch.float32)


def forward_fused(
    q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, borders: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention within the segments, zeros for slots of none, and the logsumexps."""
    out_TND = torch.zeros(q_TND.shape, dtype=q_TND.dtype)
    logsumexp_NT = empty_logsumexps(q_TND, fused=True)
    q, k, v, out = (x.transpose(0, 1)[None] for x in (q_TND, k_TND, v_TND, out_TND))
    for own in slices_of(borders):
        out[:, :, own], logsumexp_NT[None, :, own] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, own], k[:, :, own], v[:, :, own], 0.0, causal, scale=scale
        )
    return out_TND, logsumexp_NT


def backward_fused(
    grad_TND: Tensor,
    out_TND: Tensor,
    logsumexp_NT: Tensor,
    q_TND: Tensor,
    k_TND: Tensor,
    v_TND: Tensor,
    borders: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    grads_TND = tuple(torch.zeros(x.shape, dtype=x.dtype) for x in (q_TND, k_TND, v_TND))
    inputs = [x.transpose(0, 1)[None] for x in (grad_TND, q_TND, k_TND, v_TND, out_TND)]
    for own in slices_of(borders):
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x[:, :, own] for x in inputs), logsumexp_NT[None, :, own], 0.0, causal, scale=scale
        )
        for grad, part in zip(grads_TND, parts):
            grad[own] = part[0].transpose(0, 1)
    return grads_TND[0], grads_TND[1], grads_TND[2]


def slices_of(borders: Tensor) -> Iterator[slice]:
    """The slots of every segment that is not empty."""
    return (slice(start, end) for start, end in borders.T.tolist() if start < end)
