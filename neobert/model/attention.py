"""Attention within documents, on one flat stream of tokens.

A backend has two parts. `prepare` turns the borders of a batch's segments into what its kernel reads, once per forward
pass and kind of layer; `attend` runs once per layer. No backend lets a token see another document, and none has dropout
on attention probabilities. With a sliding window of w tokens, query i sees the keys j of its document with
|i - j| <= w // 2.

| backend | where | how |
|---|---|---|
| `flash_attn_varlen` | CUDA, bf16 or fp16 | one kernel over all documents: flash-attn 3, flash-attn 2, or torch's own |
| `sdpa` | everywhere | document by document on a CPU, in buckets of about one length elsewhere; `segmented.py` |
| `flex` | CUDA | FlexAttention with a mask of documents; `flex.py` |

Legend: T tokens of the flat stream, N heads, D head size.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from neobert.model.flex import attend_flex, flex_problem, prepare_flex
from neobert.model.segmented import attend_segmented, prepare_segmented
from neobert.model.segments import Segments

FLASH = "torch.nn.attention.varlen"
"""What `flash_attn_varlen` runs."""
try:
    from flash_attn_interface import flash_attn_varlen_func

    FLASH = "flash-attn 3"
except ImportError:
    try:
        from flash_attn import flash_attn_varlen_func

        FLASH = "flash-attn 2"
    except ImportError:
        flash_attn_varlen_func = None


class Attend(Protocol):
    """`[T, N, D]` queries, keys and values to `[T, N, D]` outputs; `prepared` is the backend's own."""

    def __call__(self, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prepared: Any, *, scale: float) -> Tensor: ...


class Prepare(Protocol):
    """Borders of the segments, and a layer's sliding window in tokens, to what `attend` reads; no device sync."""

    def __call__(self, segments: Segments, window: int | None = None) -> Any: ...


class FindProblem(Protocol):
    """Why a backend cannot compute in a dtype on a device, with heads of a size where one is passed; else None."""

    def __call__(self, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBackend:
    """One way of computing attention within segments."""

    name: str
    """The value for `model.attn_backend`."""

    kernel: str
    """What runs, for the log."""

    prepare: Prepare

    attend: Attend

    problem: FindProblem


def choose_attention(
    name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> AttentionBackend:
    """The backend called `name`, or with `auto` the first of ATTENTION that works for `dtype` on `device`.

    `dtype` is what matrix products are computed in: the autocast dtype where autocast is on. Without `head_dim` the
    size of the heads is not checked.
    Raises ValueError for an unknown name and for a named backend that cannot run here.
    """
    if name == "auto":
        return next(b for b in ATTENTION.values() if b.problem(device, dtype, head_dim) is None)
    if name not in ATTENTION:
        raise ValueError(f"model.attn_backend: {name!r} is unknown; write one of auto, {', '.join(sorted(ATTENTION))}")
    backend = ATTENTION[name]
    if (problem := backend.problem(device, dtype, head_dim)) is not None:
        raise ValueError(f"model.attn_backend: {name!r} {problem}; or write model.attn_backend: auto")
    return backend


def reference_attention(
    q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, segments: Segments, *, scale: float, window: int | None = None
) -> Tensor:
    """The definition: one product over the whole stream with a mask of equal segments. For tests; any dtype."""
    rows, slots = segments.ids.shape
    ids_T = (segments.ids.long() + torch.arange(rows, device=segments.ids.device)[:, None] * (slots + 1)).flatten()
    scores_NTT = scale * torch.einsum("qnd,knd->nqk", q_TND, k_TND)
    apart_TT = ids_T[:, None] != ids_T[None, :]
    if window is not None:
        token_T = torch.arange(len(ids_T), device=ids_T.device)
        apart_TT |= (token_T[:, None] - token_T).abs() > window // 2
    scores_NTT = scores_NTT.masked_fill(apart_TT, float("-inf"))
    return torch.einsum("nqk,knd->qnd", scores_NTT.softmax(dim=-1), v_TND)


# --- flash_attn_varlen: one kernel over all documents -------------------------------------------------------------


def prepare_varlen(segments: Segments, window: int | None = None) -> tuple[Tensor, int, tuple[int, int]]:
    """The borders on the device, the bound of a segment's length, and the reach to the left and right (-1: no limit).

    Segments of no tokens at the end are harmless.
    """
    reach = -1 if window is None else window // 2
    return segments.cu_seqlens, segments.max_seqlen, (reach, reach)


def attend_varlen(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prepared: Any, *, scale: float) -> Tensor:
    """Attention of each segment to itself, by the flash-attn package or by torch's kernel.

    The backward is deterministic where torch's deterministic algorithms are asked for; torch's kernel looks for itself.
    """
    borders, longest, reach = prepared
    arguments = (q_TND, k_TND, v_TND, borders, borders, longest, longest)
    if flash_attn_varlen_func is None:
        out_TND = varlen_attn(*arguments, scale=scale, window_size=reach)
        assert isinstance(out_TND, Tensor), "a tuple only where auxiliary results are asked for"
        return out_TND
    deterministic = torch.are_deterministic_algorithms_enabled()
    out = flash_attn_varlen_func(*arguments, softmax_scale=scale, window_size=reach, deterministic=deterministic)
    return out[0] if isinstance(out, tuple) else out  # the first releases of flash-attn 3 add the logsumexps


def varlen_problem(device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """Flash kernels need a CUDA device of compute capability 8.0 (Ampere) or later, bf16 or fp16, heads in eights."""
    if device.type != "cuda":
        return f"needs a CUDA device, and this run computes on {device.type}: write model.attn_backend: sdpa"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bf16, not in {str(dtype).removeprefix('torch.')}: write trainer.mixed_precision: bf16"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs an Ampere GPU or later, not {torch.cuda.get_device_name(device)}: write model.attn_backend: sdpa"
    if head_dim is not None and (head_dim % 8 or head_dim > 256):
        return (
            "needs heads of a multiple of 8 and at most 256, and model.hidden_size / model.num_attention_heads is "
            f"{head_dim}: choose another model.num_attention_heads, or write model.attn_backend: sdpa"
        )
    return None


ATTENTION: dict[str, AttentionBackend] = {
    "flash_attn_varlen": AttentionBackend(
        name="flash_attn_varlen",
        kernel=FLASH,
        prepare=prepare_varlen,
        attend=attend_varlen,
        problem=varlen_problem,
    ),
    "sdpa": AttentionBackend(
        name="sdpa",
        kernel="document by document",
        prepare=prepare_segmented,
        attend=attend_segmented,
        problem=lambda device, dtype, head_dim=None: None,
    ),
    "flex": AttentionBackend(
        name="flex",
        kernel="FlexAttention",
        prepare=prepare_flex,
        attend=attend_flex,
        problem=flex_problem,
    ),
}
"""All backends, in the order in which `auto` tries them."""
