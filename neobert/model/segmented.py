"""Attention segment by segment: the backend `sdpa`, which works on every device and in every dtype.

On a CPU it computes softmax(scale * Q K^T) V document by document, several times faster than one masked product over
the stream: in fp32 and without a window with torch's fused kernel (`fused_documents`), otherwise with plain products.
Queries go in tiles of bounded size then, and the backward computes the probabilities of a tile again, so that nothing
quadratic in a document's length is kept. With a sliding window a tile reads only the keys within reach: the cost is
linear in the length of a document; of causal segments it reads the keys up to its last query. In bf16 a document is
computed in whole blocks of slots, at the end of the stream too, and the rest masked away: torch's library keeps code
for every shape; short ones go together (`short_documents`).

On other devices documents of about one length go together, padded to the length of their bucket, through torch's
scaled_dot_product_attention. Lengths of buckets grow by half at most, so no more than a third of a bucket is padding
(documents of less than 16 tokens apart), whatever the length of a row.

Forward and backward are opaque to `torch.compile`: the loop over documents depends on the data, yet a compiled block
stays one graph. Both read the borders on the host, where they are known, and wait for no device.

Legend: T tokens of the flat stream, N heads, D head size, Q queries and K keys of a tile, B documents of length L.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neobert.model.buckets import backward_in_buckets, forward_in_buckets, plan_buckets, unseen
from neobert.model.fused_documents import backward_fused, empty_logsumexps, forward_fused, is_fused, slices_of
from neobert.model.segments import Segments
from neobert.model.short_documents import ShortDocuments, backward_short, forward_short, scaled_product, split_short

_TILE = 2**20
"""Scores (heads x queries x keys) of one tile: 2 MB of bf16 stay in a CPU's cache."""

_BLOCK = 32
"""Slots of a block, for bf16 on a CPU."""

_LEAST_QUERIES = 128
"""Queries of a tile of a very long document: fewer would make the products too thin."""


class SegmentedPlan(NamedTuple):
    """What the operators read. Its tensors have one shape for all batches of one shape."""

    borders: Tensor
    """On the host, `[2, N]`: begin and end of each segment; where there are buckets, length and number of documents of
    each of them."""

    slots: Tensor
    """int64, on the device: slots of the tokens of every bucket, one bucket after the other; empty on a CPU."""

    reach: int
    """How far a token sees to either side; -1 without a sliding window."""

    causal: bool
    """Whether it sees nothing after itself."""


def prepare_segmented(segments: Segments, window: int | None = None) -> SegmentedPlan:
    """Start and end of each segment; for devices other than a CPU also where the tokens of every bucket are.

    Padding, where the host sees it, is left empty.
    """
    starts, ends = segments.cu_seqlens_cpu[:-1], segments.cu_seqlens_cpu[1:]
    reach = -1 if window is None else window // 2
    device = segments.ids.device
    if device.type != "cpu":
        buckets, slots = plan_buckets(torch.stack((starts, ends)), segments.ids.numel())
        if device.type == "cuda":  # From pageable memory the host would wait for everything that is queued there.
            slots = slots.pin_memory().to(device, non_blocking=True)
        return SegmentedPlan(borders=buckets, slots=slots.to(device), reach=reach, causal=segments.causal)
    ids = segments.ids.flatten()
    ends = torch.where(ids[starts.clamp(max=ids.shape[0] - 1)] == 0, starts, ends)
    return SegmentedPlan(
        borders=torch.stack((starts, ends)),
        slots=torch.empty(0, dtype=torch.int64, device=device),
        reach=reach,
        causal=segments.causal,
    )


def attend_segmented(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prepared: Any, *, scale: float) -> Tensor:
    """Attention of each segment to itself; zeros for slots of padding that `prepare_segmented` left out."""
    plan: SegmentedPlan = prepared
    out_TND: Tensor
    out_TND, _ = segmented_attention(q_TND, k_TND, v_TND, plan.borders, plan.slots, scale, plan.reach, plan.causal)
    return out_TND


@torch.library.custom_op("neobert::segmented_attention", mutates_args=())
def segmented_attention(
    q_TND: Tensor,
    k_TND: Tensor,
    v_TND: Tensor,
    borders: Tensor,
    slots: Tensor,
    scale: float,
    reach: int,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T) V within each segment and `reach`; arguments as in SegmentedPlan.

    The second tensor is what the fused kernel keeps for its backward.
    """
    # An operator's body runs with the caller's autocast state: the dtypes are fixed here, so it is switched off.
    with torch.autocast(q_TND.device.type, enabled=False):
        if is_fused(q_TND, slots, reach):
            return forward_fused(q_TND, k_TND, v_TND, borders, scale, causal)
        if len(slots):
            out_TND = forward_in_buckets(q_TND, k_TND, v_TND, borders, slots, scale, reach, causal)
        else:
            out_TND = _forward_by_document(q_TND, k_TND, v_TND, borders, scale, reach, causal)
        return out_TND, empty_logsumexps(q_TND, fused=False)


@torch.library.custom_op("neobert::segmented_attention_backward", mutates_args=())
def segmented_attention_backward(
    grad_TND: Tensor,
    out_TND: Tensor,
    logsumexp_NT: Tensor,
    q_TND: Tensor,
    k_TND: Tensor,
    v_TND: Tensor,
    borders: Tensor,
    slots: Tensor,
    scale: float,
    reach: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    with torch.autocast(q_TND.device.type, enabled=False):
        if is_fused(q_TND, slots, reach):
            return backward_fused(grad_TND, out_TND, logsumexp_NT, q_TND, k_TND, v_TND, borders, scale, causal)
        if len(slots):
            return backward_in_buckets(grad_TND, q_TND, k_TND, v_TND, borders, slots, scale, reach, causal)
        return _backward_by_document(grad_TND, q_TND, k_TND, v_TND, borders, scale, reach, causal)


# --- document by document, with matrix products -------------------------------------------------------------------


class _Tile(NamedTuple):
    """Queries that go together, and the keys that some of them see; all counted from the start of the document."""

    queries: slice
    own: int
    """How many of the queries are the document's own."""

    keys: slice
    own_keys: int
    masked: bool
    """Whether some of these keys are out of reach of some of these queries, or after them."""


class _Document(NamedTuple):
    """A segment, its end rounded up to a whole block: what lies beyond is a neighbour's and counts for nothing."""

    slots: slice
    length: int
    tiles: list[_Tile]


def _documents(borders: Tensor, q_NTD: Tensor, reach: int, causal: bool = False) -> Iterator[_Document]:
    """Every segment that is not empty."""
    num_heads = q_NTD.shape[0]
    block = _BLOCK if q_NTD.dtype == torch.bfloat16 else 1
    for segment in slices_of(borders):
        start, length = segment.start, segment.stop - segment.start
        stop = -(-length // block) * block
        banded = 0 <= reach < length - 1
        # With a window, as many queries as it has keys to a side: at most two thirds of the keys are out of reach.
        step = max(_LEAST_QUERIES, _TILE // (num_heads * (min(stop, 3 * reach + 1) if banded else stop)))
        step = max(min(step, max(reach, _LEAST_QUERIES)) if banded else step, block) // block * block
        tiles = []
        for first in range(0, length, step):
            last = min(first + step, stop)
            begin, until = 0, stop
            if banded:
                begin = max(0, first - reach) // block * block
                until = min(-(-(last + reach) // block) * block, stop)
            if causal:
                until = min(until, last)
            own, own_keys, masked = min(last, length) - first, min(until, length) - begin, banded or causal
            tiles.append(_Tile(slice(first, last), own, slice(begin, until), own_keys, masked))
        yield _Document(slice(start, start + stop), length, tiles)


def _take(x_NTD: Tensor, slots: slice) -> Tensor:
    """Contiguous copy of some slots, with zeros for those after the end of the stream."""
    own = x_NTD[:, slots]
    missing = slots.stop - slots.start - own.shape[1]
    return F.pad(own, (0, 0, 0, missing)) if missing else own.contiguous()


def _forward_by_document(
    q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, borders: Tensor, scale: float, reach: int, causal: bool = False
) -> Tensor:
    out_TND = torch.zeros(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    short, borders = _split_short(q_TND, borders, reach)
    q, k, v, out = (x.transpose(0, 1) for x in (q_TND, k_TND, v_TND, out_TND))
    scratch = _Scratch(q, 2)
    for batch in short:
        forward_short(q_TND, k_TND, v_TND, out_TND, batch, scale, causal)
    for document in _documents(borders, q, reach, causal):
        q_own, k_own, v_own = (_take(x, document.slots) for x in (q, k, v))
        out_own = out[:, document.slots]
        for tile in document.tiles:
            probs = _probabilities(q_own, k_own, tile, scale, reach, causal, scratch)
            attended = torch.bmm(probs, v_own[:, tile.keys])
            out_own[:, tile.queries][:, : tile.own] = attended[:, : tile.own]
    return out_TND


def _backward_by_document(
    grad_TND: Tensor,
    q_TND: Tensor,
    k_TND: Tensor,
    v_TND: Tensor,
    borders: Tensor,
    scale: float,
    reach: int,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    grads_TND = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q_TND, k_TND, v_TND))
    short, borders = _split_short(q_TND, borders, reach)
    q, k, v, grad = (x.transpose(0, 1) for x in (q_TND, k_TND, v_TND, grad_TND))
    grad_q, grad_k, grad_v = (x.transpose(0, 1) for x in grads_TND)
    scratch = _Scratch(q, 3)
    for batch in short:
        backward_short(grad_TND, q_TND, k_TND, v_TND, grads_TND, batch, scale, causal)
    for document in _documents(borders, q, reach, causal):
        q_own, k_own, v_own, grad_own = (_take(x, document.slots) for x in (q, k, v, grad))
        grad_q_own = grad_q[:, document.slots]
        sums = None
        if len(document.tiles) > 1:  # sums over tiles are fp32 at least
            sums = [torch.zeros(k_own.shape, dtype=torch.promote_types(q.dtype, torch.float32)) for _ in "kv"]
        for tile in document.tiles:
            queries, keys = tile.queries, tile.keys
            probs = _probabilities(q_own, k_own, tile, scale, reach, causal, scratch)
            probs[:, tile.own :] = 0
            grad_probs = scratch.matrices(2, probs.shape)
            torch.bmm(grad_own[:, queries], v_own[:, keys].transpose(1, 2), out=grad_probs)
            grad_scores = scratch.matrices(0, probs.shape)  # the scores are not needed any more
            torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype, grad_input=grad_scores)
            part_q = scaled_product(grad_scores, k_own[:, keys], scale)
            grad_q_own[:, queries][:, : tile.own] = part_q[:, : tile.own]
            part_k = scaled_product(grad_scores.transpose(1, 2), q_own[:, queries], scale)
            part_v = torch.bmm(probs.transpose(1, 2), grad_own[:, queries])
            if sums is None:
                sums = [part_k, part_v]
            else:
                sums[0][:, keys] += part_k
                sums[1][:, keys] += part_v
        assert sums is not None, "a document has a tile"
        for target, total in zip((grad_k, grad_v), sums):
            target[:, document.slots][:, : document.length] = total[:, : document.length]
    return grads_TND[0], grads_TND[1], grads_TND[2]


def _split_short(q_TND: Tensor, borders: Tensor, reach: int) -> tuple[list[ShortDocuments], Tensor]:
    """Batches of short documents where they are worth it, and the borders of the rest."""
    if q_TND.dtype != torch.bfloat16:
        return [], borders
    return split_short(borders, block=_BLOCK, reach=reach, num_heads=q_TND.shape[1])


class _Scratch:
    """Memory for the scores of a tile and what is made of them: used again, it stays in the cache."""

    def __init__(self, q_NTD: Tensor, count: int) -> None:
        self._like = q_NTD
        self._flat: list[Tensor | None] = [None] * count

    def matrices(self, number: int, shape: Sequence[int]) -> Tensor:
        """A contiguous tensor of `shape` in the dtype of the queries; its content is whatever was there."""
        size, flat = math.prod(shape), self._flat[number]
        if flat is None or len(flat) < size:
            flat = self._flat[number] = self._like.new_empty(max(size, _TILE))
        return flat[:size].view(shape)


def _probabilities(
    q_NTD: Tensor, k_NTD: Tensor, tile: _Tile, scale: float, reach: int, causal: bool, scratch: _Scratch
) -> Tensor:
    """Softmax over the scores of a tile, `[N, Q, K]`, in scratch 1, with scratch 0 used on the way; fp32 inside."""
    q_NQD, k_NKD = q_NTD[:, tile.queries], k_NTD[:, tile.keys]
    shape = (q_NQD.shape[0], q_NQD.shape[1], k_NKD.shape[1])
    scores_NQK = scaled_product(q_NQD, k_NKD.transpose(1, 2), scale, out=scratch.matrices(0, shape))
    if tile.own_keys < shape[2]:
        scores_NQK[:, :, tile.own_keys :] = float("-inf")
    if tile.masked:
        num_queries, num_keys = scores_NQK.shape[1:]
        queries = torch.arange(tile.queries.start - tile.keys.start, tile.queries.stop - tile.keys.start)
        distance_QK = queries[:num_queries, None] - torch.arange(num_keys)
        scores_NQK.masked_fill_(unseen(distance_QK, reach, causal), float("-inf"))
        # Nobody reads the rows after the document's end, but one that sees no key is NaN, which a product may spread.
        scores_NQK[:, tile.own :] = 0
    return torch.softmax(scores_NQK, dim=-1, out=scratch.matrices(1, shape))


# --- what autograd and the compiler need to know -------------------------------------------------------------------


@segmented_attention.register_fake
def _(
    q_TND: Tensor,
    k_TND: Tensor,
    v_TND: Tensor,
    borders: Tensor,
    slots: Tensor,
    scale: float,
    reach: int,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    out_TND = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    return out_TND, empty_logsumexps(q_TND, fused=is_fused(q_TND, slots, reach))


@segmented_attention_backward.register_fake
def _(
    grad_TND: Tensor,
    out_TND: Tensor,
    logsumexp_NT: Tensor,
    q_TND: Tensor,
    k_TND: Tensor,
    v_TND: Tensor,
    borders: Tensor,
    slots: Tensor,
    scale: float,
    reach: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_TND, k_TND, v_TND))
    return grad_q, grad_k, grad_v


def _keep(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float, int, bool], output: tuple[Tensor, Tensor]
) -> None:
    q_TND, k_TND, v_TND, borders, slots, ctx.scale, ctx.reach, ctx.causal = inputs
    ctx.save_for_backward(*output, q_TND, k_TND, v_TND, borders, slots)


def _differentiate(ctx: Any, grad_TND: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = segmented_attention_backward(grad_TND, *ctx.saved_tensors, ctx.scale, ctx.reach, ctx.causal)
    return (*grads, None, None, None, None, None)


segmented_attention.register_autograd(_differentiate, setup_context=_keep)
