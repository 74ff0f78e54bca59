"""Losses over the embeddings of a step. Pure functions; all similarities are cosines, or means of them (MaxSim).

Each returns the sum over this process's rows, so that the sum over processes, divided by the rows of all of them, is
the loss of the step. Embeddings that come from other processes take part with their gradients.

The similarities of some rows at a time are kept, see `sum_over_blocks`, and the memory of a step is linear in its rows.
Only `cosent`, which compares all pairs with each other at once, takes their square.

Legend: N rows of this process, M rows or candidates of all processes, D width.

Values of all processes on every process, with exact gradients.

Every process computes the loss of its own rows against the embeddings of all. The gradient of the sum of these losses
with respect to one process's embeddings has a part from every process: the backward adds them up.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from neobert.objectives.late_interaction import TokenVectors, Units, compare

ROWS_AT_ONCE = 256
"""Rows of a block: with all candidates enough for a full matrix product."""


def info_nce(
    anchors_ND: Units,
    candidates_MD: Units,
    own_N: Tensor,
    excluded_NM: Tensor,
    *,
    scale: Tensor | float,
    bonus_NM: Tensor | None = None,
    margin: float | None = None,
) -> Tensor:
    """-log softmax of the own candidate's similarity among all (van den Oord et al., arXiv 1807.03748, equation 4).

    Args:
        anchors_ND: of length 1, as the candidates.
        own_N: the candidate that belongs to each anchor.
        excluded_NM: candidates that are no negatives of an anchor; never its own one.
        scale: 1 / temperature.
        bonus_NM: added to the logits (hard negatives of SimCSE, Gao et al., arXiv 2104.08821, equation 8).
        margin: also excludes candidates more similar to the anchor than its own one by more than this.
    """
    similarity_NM = compare(anchors_ND, candidates_MD)
    if margin is not None:
        limit_N1 = similarity_NM.detach().gather(1, own_N[:, None]) + margin
        excluded_NM = excluded_NM | (similarity_NM.detach() > limit_N1)
    logits_NM = scale * similarity_NM
    if bonus_NM is not None:
        logits_NM = logits_NM + bonus_NM
    logits_NM = logits_NM.masked_fill(excluded_NM, float("-inf"))
    return F.cross_entropy(logits_NM, own_N, reduction="sum")


def sup_con(
    anchors_ND: Units,
    all_MD: Units,
    labels_N: Tensor,
    labels_M: Tensor,
    own_N: Tensor,
    *,
    scale: Tensor | float,
) -> Tensor:
    """Supervised contrastive loss (Khosla et al., arXiv 2004.11362, equation 2): every other text of an anchor's class
    among all other texts. An anchor without another one of its class counts 0.

    Args:
        own_N: index of each anchor among `all_MD`.
    """
    logits_NM = scale * compare(anchors_ND, all_MD)
    itself_NM = own_N[:, None] == torch.arange(len(all_MD), device=own_N.device)
    log_probs_NM = F.log_softmax(logits_NM.masked_fill(itself_NM, float("-inf")), dim=1)
    same_NM = (labels_N[:, None] == labels_M) & ~itself_NM
    sums_N = torch.where(same_NM, log_probs_NM, 0.0).sum(dim=1)
    return -(sums_N / same_NM.sum(dim=1).clamp(min=1)).sum()


def cosent(similarity_M: Tensor, scores_M: Tensor, *, scale: Tensor | float) -> Tensor:
    """log(1 + sum of exp(scale * (similarity_j - similarity_i)) over all pairs i, j with a higher score of i): pairs of
    texts ranked by their scores (CoSENT, Su 2022, https://kexue.fm/archives/8847). A mean, not a sum."""
    differences_MM = scale * (similarity_M[None, :] - similarity_M[:, None])
    ordered_MM = scores_M[:, None] > scores_M[None, :]
    terms = differences_MM.masked_fill(~ordered_MM, float("-inf")).flatten()
    return torch.logsumexp(torch.cat([terms.new_zeros(1), terms]), dim=0)


def vector_distance(units_ND: Tensor, taught_ND: Tensor) -> Tensor:
    """1 - cosine of each vector and its teacher's."""
    return (1 - (units_ND * taught_ND).sum(dim=1)).sum()


def similarity_error(units_ND: Tensor, taught_NE: Tensor, all_MD: Tensor, all_ME: Tensor) -> Tensor:
    """The mean squared difference between the cosines of each vector with all others and those of its teacher, whose
    width may be another (Tung & Mori, arXiv 1907.09682, with every row weighted alike)."""
    return (units_ND @ all_MD.T - taught_NE @ all_ME.T).square().mean(dim=1).sum()


def sum_over_blocks(loss: Callable[..., Tensor], *rows: Units) -> Tensor:
    """`loss` of vectors and tensors `[N, ...]`, a sum over rows, block by block: the backward computes the similarities
    of a block again, a product that is small beside the encoder's."""
    if len(rows[0]) <= ROWS_AT_ONCE:
        return loss(*rows)
    blocks = zip(*(x.split(ROWS_AT_ONCE) for x in rows))
    sums = [checkpoint(loss, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    return torch.stack(sums).sum()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _all_gather(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)  # this one may be somebody else's too
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def _all_gather(values: Tensor) -> Tensor:
    values = values.contiguous()
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)


def gather(values: Tensor) -> Tensor:
    """Rows of all processes in rank order, `[W * n, ...]` of `[n, ...]`; as many on every process. Differentiable."""
    if not is_distributed():
        return values
    return _Gather.apply(values) if values.requires_grad else _all_gather(values)


def gather_units(vectors: Units) -> Units:
    """The same of vectors of texts. Token vectors are padded for the exchange, which waits for the device."""
    if not isinstance(vectors, TokenVectors):
        return gather(vectors)
    if not is_distributed():
        return vectors
    lengths = gather(vectors.lengths_N)
    counts = lengths.view(dist.get_world_size(), -1).sum(dim=1).tolist()
    padding = max(counts) - len(vectors.tokens_TD)
    parts = gather(F.pad(vectors.tokens_TD, (0, 0, 0, padding))).split(max(counts))
    return TokenVectors(torch.cat([part[:count] for part, count in zip(parts, counts)]), lengths)


def is_distributed() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first_row(num_rows: int) -> int:
    """Where this process's rows begin among those that `gather` gives."""
    return dist.get_rank() * num_rows if is_distributed() else 0
