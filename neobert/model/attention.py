"""Attention within documents, on one flat stream of tokens.

A backend has two parts. `prepare` turns the borders of a batch's segments into what its kernel reads, once per forward
pass; `attend` runs once per layer. No backend lets a token see another document, and none has dropout on attention
probabilities.

`sdpa` works everywhere. It computes softmax(scale * Q K^T) V document by document with plain matrix products. On a CPU
this beats one masked product over the whole stream several times over, and in bf16 it also beats torch's fused CPU
kernel called per document (forward + backward over 4,096 tokens, 17 documents, 4 heads of 64, 2 cores: 18 ms against
37; in fp32 the fused kernel is 10 to 20% faster). Queries go in tiles of bounded size, and the backward computes the
probabilities of a tile again, so that nothing quadratic in a document's length is ever kept. In bf16 on a CPU a
document is computed up to the next whole block of slots, and what lies beyond it is masked away: torch's library keeps
code and memory for every shape it has multiplied. Forward and backward are opaque operators to `torch.compile`: the
loop over documents is data-dependent, yet a compiled block stays one graph.

`flash_attn_varlen` is for CUDA devices in bf16 or fp16: the flash-attn package when it is installed, else the kernel
that torch brings.

Legend: T tokens of the flat stream, N heads, D head size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from neobert.model.segments import Segments

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None


class Attend(Protocol):
    """`[T, N, D]` queries, keys and values to `[T, N, D]` outputs; `prepared` is the backend's own."""

    def __call__(self, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prepared: Any, *, scale: float) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBackend:
    """One way of computing attention within segments."""

    name: str
    """The word for `model.attn_backend`."""

    kernel: str
    """What runs, for the log."""

    prepare: Callable[[Segments], Any]
    """Borders of the segments to what `attend` reads; no device sync."""

    attend: Attend

    obstacle: Callable[[torch.device, torch.dtype], str | None]
    """Why this backend cannot compute in a dtype on a device; None when it can."""


def choose_attention(name: str, *, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The backend called `name`, or with `auto` the first of ATTENTION that works for `dtype` on `device`.

    `dtype` is what matrix products are computed in: the autocast dtype where autocast is on.
    Raises ValueError for an unknown name and for a named backend that cannot run here.
    """
    if name == "auto":
        return next(b for b in ATTENTION.values() if b.obstacle(device, dtype) is None)
    if name not in ATTENTION:
        raise ValueError(f"model.attn_backend: {name!r} is unknown; write one of auto, {', '.join(sorted(ATTENTION))}")
    backend = ATTENTION[name]
    if (obstacle := backend.obstacle(device, dtype)) is not None:
        raise ValueError(f"model.attn_backend: {name!r} {obstacle}; or write model.attn_backend: auto")
    return backend


def reference_attention(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, segments: Segments, *, scale: float) -> Tensor:
    """The definition: one product over the whole stream with a mask of equal segments. For tests; any dtype."""
    rows, slots = segments.ids.shape
    ids_T = (segments.ids.long() + torch.arange(rows, device=segments.ids.device)[:, None] * (slots + 1)).flatten()
    scores_NTT = scale * torch.einsum("qnd,knd->nqk", q_TND, k_TND)
    scores_NTT = scores_NTT.masked_fill(ids_T[:, None] != ids_T[None, :], float("-inf"))
    return torch.einsum("nqk,knd->qnd", scores_NTT.softmax(dim=-1), v_TND)


# --- sdpa: document by document -----------------------------------------------------------------------------------

_TILE = {"cpu": 2**20}
_TILE_ELSEWHERE = 2**26
"""Scores (heads x queries x keys) of one tile: 2 MB of bf16 stay in a CPU's cache, other devices want more at once."""

_BLOCK = 32
"""In bf16 a CPU multiplies by code made for each shape, which is kept: lengths in whole blocks need little of it."""

_LEAST_QUERIES = 128
"""Queries of a tile of a very long document: fewer would make the products too thin."""


def prepare_sdpa(segments: Segments) -> Tensor:
    """Begin and end of each segment, int32 `[2, N]` on the host. Padding, where the host sees it, is left empty."""
    starts, ends = segments.cu_seqlens_cpu[:-1], segments.cu_seqlens_cpu[1:]
    if segments.ids.device.type == "cpu":
        ids = segments.ids.flatten()
        ends = torch.where(ids[starts.clamp(max=ids.shape[0] - 1)] == 0, starts, ends)
    return torch.stack((starts, ends))


def attend_sdpa(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prepared: Any, *, scale: float) -> Tensor:
    """Attention of each segment to itself; zeros for slots of padding that `prepare_sdpa` left out."""
    return segmented_attention(q_TND, k_TND, v_TND, prepared, scale)


class _Document(NamedTuple):
    """A segment, its end rounded up to a whole block: what lies beyond is a neighbour's and counts for nothing."""

    slots: slice
    length: int
    tiles: list[tuple[slice, int]]
    """Queries that go together, and how many of them are the document's own."""


def _documents(borders: Tensor, q_NTD: Tensor) -> Iterator[_Document]:
    """Every segment that is not empty."""
    num_heads, num_tokens = q_NTD.shape[:2]
    tile = _TILE.get(q_NTD.device.type, _TILE_ELSEWHERE)
    block = _BLOCK if q_NTD.device.type == "cpu" and q_NTD.dtype == torch.bfloat16 else 1
    for start, end in borders.T.tolist():
        if start >= end:
            continue
        stop = min(start + -(-(end - start) // block) * block, num_tokens)
        step = max(_LEAST_QUERIES, tile // (num_heads * (stop - start)) // block * block)
        firsts = range(start, end, step)
        tiles = [(slice(i, min(i + step, stop)), min(i + step, end) - i) for i in firsts]
        yield _Document(slice(start, stop), end - start, tiles)


@torch.library.custom_op("neobert::segmented_attention", mutates_args=())
def segmented_attention(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, borders: Tensor, scale: float) -> Tensor:
    """softmax(scale * Q K^T) V within each segment; `borders` as `prepare_sdpa` makes them."""
    out_TND = torch.zeros(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    # An operator's body runs with the caller's autocast state: the dtypes are settled here, so it is switched off.
    with torch.autocast(q_TND.device.type, enabled=False):
        q, k, v, out = (x.transpose(0, 1) for x in (q_TND * scale, k_TND, v_TND, out_TND))
        for slots, length, tiles in _documents(borders, q):
            for rows, own in tiles:
                attended = torch.bmm(_probabilities(q[:, rows], k[:, slots], length), v[:, slots])
                out[:, rows][:, :own] = attended[:, :own]
    return out_TND


@torch.library.custom_op("neobert::segmented_attention_backward", mutates_args=())
def segmented_attention_backward(
    grad_TND: Tensor, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, borders: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, from probabilities that are computed again tile by tile."""
    grads_TND = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q_TND, k_TND, v_TND))
    with torch.autocast(q_TND.device.type, enabled=False):
        q, k, v, grad = (x.transpose(0, 1) for x in (q_TND * scale, k_TND, v_TND, grad_TND))
        grad_q, grad_k, grad_v = (x.transpose(0, 1) for x in grads_TND)
        for slots, length, tiles in _documents(borders, q):
            sums: tuple[Tensor, Tensor] | None = None
            for rows, own in tiles:
                probs = _probabilities(q[:, rows], k[:, slots], length)
                probs[:, own:] = 0
                grad_probs = torch.bmm(grad[:, rows], v[:, slots].transpose(1, 2))
                grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
                grad_q[:, rows][:, :own] = torch.bmm(grad_scores, k[:, slots])[:, :own]
                part_k = torch.bmm(grad_scores.transpose(1, 2), q[:, rows])
                part_v = torch.bmm(probs.transpose(1, 2), grad[:, rows])
                sums = (part_k, part_v) if sums is None else (_added(sums[0], part_k), _added(sums[1], part_v))
            assert sums is not None, "a document has a tile"
            grad_k[:, slots][:, :length], grad_v[:, slots][:, :length] = (x[:, :length] for x in sums)
        grads_TND[0].mul_(scale)
    return grads_TND[0], grads_TND[1], grads_TND[2]


def _added(total: Tensor, part: Tensor) -> Tensor:
    """A sum over tiles, in fp32 at least."""
    return total.to(torch.promote_types(part.dtype, torch.float32)) + part


def _probabilities(q_NQD: Tensor, k_NKD: Tensor, num_keys: int) -> Tensor:
    """Softmax over the first `num_keys` scores of scaled queries, `[N, Q, K]`; sums and maxima are fp32 inside."""
    scores_NQK = torch.bmm(q_NQD, k_NKD.transpose(1, 2))
    scores_NQK[:, :, num_keys:] = float("-inf")
    return torch.softmax(scores_NQK, dim=-1)


@segmented_attention.register_fake
def _(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, borders: Tensor, scale: float) -> Tensor:
    return torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)


@segmented_attention_backward.register_fake
def _(
    grad_TND: Tensor, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, borders: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_TND, k_TND, v_TND))
    return grad_q, grad_k, grad_v


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    q_TND, k_TND, v_TND, borders, ctx.scale = inputs
    ctx.save_for_backward(q_TND, k_TND, v_TND, borders)


def _differentiate(ctx: Any, grad_TND: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    return (*segmented_attention_backward(grad_TND, *ctx.saved_tensors, ctx.scale), None, None)


segmented_attention.register_autograd(_differentiate, setup_context=_keep)


# --- flash_attn_varlen: one kernel over all documents -------------------------------------------------------------


def prepare_varlen(segments: Segments) -> tuple[Tensor, int]:
    """The borders on the device, and the bound of a segment's length. Segments of no tokens at the end are harmless."""
    return segments.cu_seqlens, segments.max_seqlen


def attend_varlen(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prepared: Any, *, scale: float) -> Tensor:
    """Attention of each segment to itself, by the flash-attn package or by torch's kernel."""
    borders, longest = prepared
    if flash_attn_varlen_func is None:
        out_TND = varlen_attn(q_TND, k_TND, v_TND, borders, borders, longest, longest, scale=scale)
        assert isinstance(out_TND, Tensor), "a tuple only where auxiliary results are asked for"
        return out_TND
    # torch's own kernel reads this switch by itself.
    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attn_varlen_func(
        q_TND, k_TND, v_TND, borders, borders, longest, longest, softmax_scale=scale, deterministic=deterministic
    )


def varlen_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Flash kernels need a CUDA device of compute capability 8.0 (Ampere) or later, and bf16 or fp16."""
    if device.type != "cuda":
        return f"needs a CUDA device, and this run computes on {device.type}: write model.attn_backend: sdpa"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bf16, not in {str(dtype).removeprefix('torch.')}: write trainer.mixed_precision: bf16"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs an Ampere GPU or later, not {torch.cuda.get_device_name(device)}: write model.attn_backend: sdpa"
    return None


ATTENTION: dict[str, AttentionBackend] = {
    "flash_attn_varlen": AttentionBackend(
        name="flash_attn_varlen",
        kernel="torch.nn.attention.varlen" if flash_attn_varlen_func is None else "flash-attn package",
        prepare=prepare_varlen,
        attend=attend_varlen,
        obstacle=varlen_obstacle,
    ),
    "sdpa": AttentionBackend(
        name="sdpa",
        kernel="document by document",
        prepare=prepare_sdpa,
        attend=attend_sdpa,
        obstacle=lambda device, dtype: None,
    ),
}
"""All backends, in the order in which `auto` tries them."""
