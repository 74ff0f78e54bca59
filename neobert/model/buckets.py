"""Attention of documents of about one length, padded to the length of their bucket, on devices other than a CPU; see
`segmented`.

Legend: T tokens of the flat stream, N heads, D head size, B documents of length L.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_SHORTEST_BUCKET = 16

_BUCKET_SCORES = 2**26
"""Scores of the documents of a bucket that go through the backward together."""
_MOST_DOCUMENTS = 65_535
"""Of a bucket at once: CUDA's grid ends there."""


def bucket_length(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that is not less than `length`."""
    bucket = _SHORTEST_BUCKET
    while bucket < length:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket // 3 * 4
    return bucket


def plan_buckets(borders: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """For segments that begin and end at `borders` `[2, N]`, both on the host and int64:

    - `[2, K]`, length and number of documents of every bucket, shortest first, then zeros;
    - the slots of every bucket's documents `[B, L]`, flat, one bucket after the other, then zeros.

    Beyond its end a document repeats its last token, so that slots count on only within a document. The sizes depend
    on the number of tokens and borders alone.
    """
    found: dict[int, list[tuple[int, int]]] = {}
    for start, end in borders.T.tolist():
        if start < end:
            found.setdefault(bucket_length(end - start), []).append((start, end))
    table = torch.zeros(2, 2 * max(num_tokens, 1).bit_length(), dtype=torch.int64)
    slots = torch.zeros(num_tokens + num_tokens // 2 + _SHORTEST_BUCKET * borders.shape[1], dtype=torch.int64)
    first = 0
    for number, (bucket, documents) in enumerate(sorted(found.items())):
        table[:, number] = torch.tensor([bucket, len(documents)])
        starts, ends = torch.tensor(documents).T[..., None]
        part = torch.minimum(starts + torch.arange(bucket), ends - 1).flatten()
        slots[first : first + len(part)] = part
        first += len(part)
    return table, slots


def unseen(distance: Tensor, reach: int, causal: bool) -> Tensor:
    """Which keys a query does not see that are `distance` slots before it; `reach` is -1 without a sliding window."""
    if not causal:
        return distance.abs() > reach
    return distance < 0 if reach < 0 else (distance < 0) | (distance > reach)


class _Bucket(NamedTuple):
    slots_BL: Tensor
    real_BL: Tensor
    """Whether a slot is a document's own."""

    seen_B1LL: Tensor
    """Which keys a query attends to; queries of the padding repeat the last token."""


def _each_bucket(buckets: Tensor, slots: Tensor, reach: int, causal: bool, num_heads: int) -> Iterator[_Bucket]:
    """Buckets cut so that their scores are bounded."""
    begin = 0
    for length, num_documents in buckets.T.tolist():
        most = max(1, min(_MOST_DOCUMENTS, _BUCKET_SCORES // max(1, num_heads * length * length)))
        for first in range(0, num_documents, most):
            count = min(most, num_documents - first)
            slots_BL = slots[begin : begin + count * length].view(count, length)
            begin += count * length
            position_BL = slots_BL - slots_BL[:, :1]
            real_BL = position_BL == torch.arange(length, device=slots.device)
            seen_B1LL = real_BL[:, None, None, :].expand(count, 1, length, length)
            if reach >= 0 or causal:
                distance_BLL = position_BL[:, :, None] - position_BL[:, None, :]
                seen_B1LL = seen_B1LL & ~unseen(distance_BLL, reach, causal)[:, None]
            yield _Bucket(slots_BL, real_BL, seen_B1LL)


def forward_in_buckets(
    q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, borders: Tensor, slots: Tensor, scale: float, reach: int, causal: bool
) -> Tensor:
    out_TND = torch.zeros(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    for bucket in _each_bucket(borders, slots, reach, causal, q_TND.shape[1]):
        q, k, v = (x[bucket.slots_BL].transpose(1, 2) for x in (q_TND, k_TND, v_TND))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bucket.seen_B1LL, scale=scale).transpose(1, 2)
        _add(out_TND, attended, bucket)
    return out_TND


def backward_in_buckets(
    grad_TND: Tensor,
    q_TND: Tensor,
    k_TND: Tensor,
    v_TND: Tensor,
    borders: Tensor,
    slots: Tensor,
    scale: float,
    reach: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q_TND, k_TND, v_TND))
    for bucket in _each_bucket(borders, slots, reach, causal, q_TND.shape[1]):
        q, k, v, grad = (x[bucket.slots_BL].transpose(1, 2) for x in (q_TND * scale, k_TND, v_TND, grad_TND))
        grad = grad * bucket.real_BL[:, None, :, None]
        scores = (q @ k.transpose(-1, -2)).masked_fill_(~bucket.seen_B1LL, float("-inf"))
        probs = torch.softmax(scores, dim=-1)
        grad_probs = grad @ v.transpose(-1, -2)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
        parts = (grad_scores @ k * scale, grad_scores.transpose(-1, -2) @ q, probs.transpose(-1, -2) @ grad)
        for total, part in zip(grads, parts):
            _add(total, part.transpose(1, 2), bucket)
    return grads[0], grads[1], grads[2]


def _add(total_TND: Tensor, part_BLND: Tensor, bucket: _Bucket) -> None:
    """Writes the real slots of a bucket; each is met once, and what is in the padding is turned into zeros."""
    part_BLND = part_BLND.masked_fill(~bucket.real_BL[..., None, None], 0)
    total_TND.index_add_(0, bucket.slots_BL.flatten(), part_BLND.flatten(0, 1))
