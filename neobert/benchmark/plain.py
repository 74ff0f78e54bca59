"""The plain forms of what this code does otherwise, to measure what that brings: masked attention, unfused AdamW."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neobert.model.attention import AttentionBackend
from neobert.model.segments import Segments
from neobert.optim.groups import build_parameter_groups


def _prepare(segments: Segments, window: int | None = None) -> Tensor:
    """bool `[B, 1, S, S]`: whether a query sees a key. Padding sees padding, so that no row is empty."""
    if window is not None:
        raise ValueError("model.local_attention: the masked attention of the benchmark has no window")
    return (segments.ids[:, :, None] == segments.ids[:, None, :])[:, None]


def _attend(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prepared: Any, *, scale: float) -> Tensor:
    rows, slots = prepared.shape[0], prepared.shape[-1]
    q, k, v = (x.reshape(rows, slots, *x.shape[1:]).transpose(1, 2) for x in (q_TND, k_TND, v_TND))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=prepared, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)


MASKED_ATTENTION = AttentionBackend(
    name="masked",
    kernel="one scaled_dot_product_attention with a mask",
    prepare=_prepare,
    attend=_attend,
    obstacle=lambda device, dtype, head_dim=None: None,
)


class PlainAdamW(torch.optim.AdamW):
    """AdamW one tensor at a time. It never skips a step: a benchmark has none to skip."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None) -> Any:
        self.__dict__.pop("found_inf", None)  # torch takes the flag for a fused optimizer's.
        return super().step(closure)


def build_plain_adamw(module: torch.nn.Module, *, lr: float, weight_decay: float) -> PlainAdamW:
    """The optimizer of the benchmark without its fused kernel."""
    groups = build_parameter_groups(module, weight_decay=weight_decay)
    return PlainAdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, foreach=False)
