"""Attention of short documents on a CPU in bf16: those of one length in blocks go together, as one batch of products.

A document of a dozen tokens takes longer to call than to compute, and fine-tuning and contrastive training have little
else. A batch holds 1, 2, 4, ... documents: torch's library keeps code for every shape.

Legend: T tokens of the flat stream, N heads, D head size, B documents of L slots, M = B * N.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LONGEST = 64
"""Slots of the longest short document: longer ones are worth a call each."""

_MOST_SCORES = 2**20
"""Heads x queries x keys of a batch: 2 MB of bf16 stay in a CPU's cache."""


class ShortDocuments(NamedTuple):
    """Documents that go together."""

    slots_BL: Tensor
    """int64: slots of the tokens of each, and of its last one again after its end."""

    is_own_BL: Tensor
    """Whether a slot is not such a repetition."""


def split_short(borders: Tensor, *, block: int, reach: int, num_heads: int) -> tuple[list[ShortDocuments], Tensor]:
    """Batches of the short documents, and the borders `[2, N]` of the others.

    Args:
        borders: begin and end of each segment, on the host.
        block: lengths are rounded up to a multiple of it.
        reach: how far a token sees, which short documents are within; -1 without a sliding window.
    """
    starts, ends = borders.long()
    lengths = ends - starts
    padded = -(-lengths // block) * block
    is_short = (lengths > 0) & (padded <= LONGEST)
    if reach >= 0:
        is_short &= lengths <= reach + 1
    batches = []
    for length in range(block, LONGEST + 1, block):
        chosen = torch.nonzero(is_short & (padded == length)).squeeze(1)
        for part in _split_by_powers(chosen, max(1, _MOST_SCORES // (num_heads * length * length))):
            offsets, last_B1 = torch.arange(length), lengths[part][:, None] - 1
            slots_BL = starts[part][:, None] + torch.minimum(offsets, last_B1)
            batches.append(ShortDocuments(slots_BL, offsets <= last_B1))
    return batches, borders[:, (lengths > 0) & ~is_short]


def _split_by_powers(items: Tensor, most: int) -> Iterator[Tensor]:
    """Parts of 1, 2, 4, ... items, `most` at most, the large ones first.

    >>> [len(part) for part in _split_by_powers(torch.arange(13), 5)]
    [4, 4, 4, 1]
    """
    first = 0
    while first < len(items):
        size = 1 << (min(most, len(items) - first).bit_length() - 1)
        yield items[first : first + size]
        first += size


def forward_short(
    q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, out_TND: Tensor, batch: ShortDocuments, scale: float, causal: bool
) -> None:
    """Writes the attention of the documents to their slots of `out_TND`."""
    q_MLD, k_MLD, v_MLD = (_gather(x, batch) for x in (q_TND, k_TND, v_TND))
    attended_MLD = torch.bmm(_probabilities(q_MLD, k_MLD, batch, scale, causal), v_MLD)
    _scatter(attended_MLD, out_TND, batch)


def backward_short(
    grad_TND: Tensor,
    q_TND: Tensor,
    k_TND: Tensor,
    v_TND: Tensor,
    grads_TND: tuple[Tensor, ...],
    batch: ShortDocuments,
    scale: float,
    causal: bool,
) -> None:
    """Writes the gradients of queries, keys and values of the documents to their slots of `grads_TND`."""
    q_MLD, k_MLD, v_MLD = (_gather(x, batch) for x in (q_TND, k_TND, v_TND))
    grad_MLD = _gather(grad_TND, batch)
    # Without a gradient the rows after a document's end add nothing to those of keys and values.
    grad_MLD.view(*batch.slots_BL.shape[:1], -1, *grad_MLD.shape[1:]).mul_(batch.is_own_BL[:, None, :, None])
    probs_MLL = _probabilities(q_MLD, k_MLD, batch, scale, causal)
    grad_probs_MLL = torch.bmm(grad_MLD, v_MLD.transpose(1, 2))
    grad_scores_MLL = torch.ops.aten._softmax_backward_data(grad_probs_MLL, probs_MLL, -1, probs_MLL.dtype)
    parts = (
        scaled_product(grad_scores_MLL, k_MLD, scale),
        scaled_product(grad_scores_MLL.transpose(1, 2), q_MLD, scale),
        torch.bmm(probs_MLL.transpose(1, 2), grad_MLD),
    )
    for part_MLD, grads in zip(parts, grads_TND):
        _scatter(part_MLD, grads, batch)


def _gather(x_TND: Tensor, batch: ShortDocuments) -> Tensor:
    """`[M, L, D]`, contiguous."""
    x_BLND = x_TND.index_select(0, batch.slots_BL.flatten()).unflatten(0, batch.slots_BL.shape)
    return x_BLND.transpose(1, 2).reshape(-1, batch.slots_BL.shape[1], x_TND.shape[2])


def _scatter(x_MLD: Tensor, out_TND: Tensor, batch: ShortDocuments) -> None:
    """Writes what is own to its slots."""
    x_BLND = x_MLD.unflatten(0, (len(batch.slots_BL), -1)).transpose(1, 2)
    own = batch.is_own_BL
    out_TND[batch.slots_BL[own]] = x_BLND[own]


def scaled_product(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale * a b of batches of matrices; the factor costs nothing inside the product."""
    if out is None:
        out = a.new_empty((a.shape[0], a.shape[1], b.shape[2]))
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def _probabilities(q_MLD: Tensor, k_MLD: Tensor, batch: ShortDocuments, scale: float, causal: bool) -> Tensor:
    """Softmax over the scores of the documents, `[M, L, L]`, fp32 inside."""
    scores_MLL = scaled_product(q_MLD, k_MLD.transpose(1, 2), scale)
    scores_BNLL = scores_MLL.unflatten(0, (len(batch.slots_BL), -1))
    scores_BNLL.masked_fill_(~batch.is_own_BL[:, None, None, :], float("-inf"))
    if causal:
        scores_BNLL.masked_fill_(torch.ones(scores_BNLL.shape[2:], dtype=torch.bool).triu_(1), float("-inf"))
    return torch.softmax(scores_MLL, dim=-1)
