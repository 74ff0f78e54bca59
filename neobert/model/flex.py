"""FlexAttention with a mask of documents: the backend `flex`, for CUDA devices.

The kernel works on blocks of 128 x 128 scores and needs to know which of them hold anything to compute. Documents are
contiguous in the stream, so that follows from where they start and end: queries of a block see keys from the start of
the first one's document to the end of the last one's, within reach of the window. Nothing of the size of the scores is
made to find out, no value is read back from the device, and shapes depend on the shape of the batch alone.

torch's FlexAttention has no backward on a CPU, and says so only in the first backward: there the backend is refused.

Legend: T tokens of the flat stream, N heads, D head size, Q and K numbers of blocks of queries and of keys.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neobert.model.segments import Segments

if TYPE_CHECKING:  # Imported on first use: it brings torch's compiler, which takes a second.
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Tokens of a block."""


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    """Uncompiled it would hold all scores. Not made at import: that alone takes a second."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def prepare_flex(segments: Segments, window: int | None = None) -> "BlockMask":
    """The mask of equal documents, within `window // 2` positions where there is a window, and of keys up to the query
    where the segments are causal."""
    from torch.nn.attention.flex_attention import BlockMask

    num_tokens, device = segments.ids.numel(), segments.ids.device
    borders = segments.cu_seqlens
    token_T = torch.arange(num_tokens, dtype=torch.int32, device=device)
    segment_T = torch.searchsorted(borders, token_T, right=True) - 1
    reach = num_tokens if window is None else window // 2
    ahead = 0 if segments.causal else reach

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (segment_T[query] == segment_T[key]) & (query - key <= reach) & (key - query <= ahead)

    # Tokens that a block's first query sees at the left, and its last one at the right; the last block may be short.
    first_Q = torch.arange(0, num_tokens, BLOCK, device=device)
    last_Q = (first_Q + BLOCK - 1).clamp(max=num_tokens - 1)
    left_Q = torch.maximum(borders[segment_T[first_Q]], first_Q - reach)
    right_Q = torch.minimum(borders[segment_T[last_Q] + 1] - 1, last_Q + ahead)
    touched_QK = (left_Q[:, None] <= last_Q) & (right_Q[:, None] >= first_Q)
    # Blocks in which every query sees every key need no mask: both in one document and their far corners in reach.
    one_Q = segment_T[first_Q] == segment_T[last_Q]
    same_QK = (segment_T[first_Q][:, None] == segment_T[first_Q]) & one_Q[:, None] & one_Q
    near_QK = (last_Q[:, None] - first_Q <= reach) & (last_Q - first_Q[:, None] <= ahead)
    whole_Q = last_Q - first_Q == BLOCK - 1
    full_QK = same_QK & near_QK & whole_Q[:, None] & whole_Q
    partial = _listed(touched_QK & ~full_QK)
    return BlockMask.from_kv_blocks(
        *partial, *_listed(full_QK), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(num_tokens, num_tokens)
    )


def _listed(chosen_QK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, `[1, 1, Q]`, and which, first of all `[1, 1, Q, K]`."""
    order_QK = torch.argsort(chosen_QK.int(), dim=1, descending=True, stable=True)
    return chosen_QK.sum(1, dtype=torch.int32)[None, None], order_QK.int()[None, None]


def attend_flex(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prepared: Any, *, scale: float) -> Tensor:
    """Attention of each segment to itself."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (x.transpose(0, 1)[None] for x in (q_TND, k_TND, v_TND))
    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    return attend(q, k, v, block_mask=prepared, scale=scale)[0].transpose(0, 1)


def flex_problem(device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """FlexAttention trains on CUDA devices alone, with heads of at least 16."""
    if device.type != "cuda":
        return f"cannot train on {device.type}, where FlexAttention has no backward: write model.attn_backend: sdpa"
    if head_dim is not None and head_dim < 16:
        return (
            f"needs heads of at least 16, and model.hidden_size / model.num_attention_heads is {head_dim}: choose "
            "fewer heads, or write model.attn_backend: sdpa"
        )
    return None
