"""QK-Clip: heads whose largest attention logit exceeds a threshold get smaller queries and keys.

After the optimizer step, for every head with largest logit m > t (Kimi K2, arXiv 2507.20534, algorithm 1):

    eta = t / m,    rows of the queries *= eta^alpha,    rows of the keys *= eta^(1 - alpha)

so that with these weights the same tokens would have had t as their largest logit. Values and optimizer state stay.

m is exact: the largest logit of the step's forward passes, over all documents, micro-batches and processes. Attention
kernels do not give it away, so it is computed again in the steps that clip, block by block from what the block reads:
norm, projection, rotation and the products of queries and keys, in the types of the forward pass and without gradient.
A bound made of the norms of queries and keys would be cheaper, but it lies above the logits and would shrink heads that
are well; a few sampled documents would miss the outliers that are looked for. The price of being exact is paid in every
n-th step only. Which steps those are is a function of the step's number.

Nothing waits for the device, and a step that is left out (see `neobert.optim.optimizers`) clips nothing.

Legend: B rows, S slots of a row, T = B * S, L layers, N heads, D head size, H hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from neobert.config.schema_optimizer import MuonSection
from neobert.model.encoder import Encoder
from neobert.model.layers import EncoderBlock
from neobert.model.segments import Segments
from neobert.optim.owners import first_row
from neobert.optim.sharded_weights import local

Largest = Callable[[Tensor], Tensor]
"""The elementwise maximum over all processes."""


def clips_in_step(section: MuonSection, step: int) -> bool:
    """Whether the step of this number, counted from 0, clips."""
    return step >= section.clipping_warmup_steps and (step + 1) % section.clipping_interval == 0


class QKClip:
    """Measures and clips the heads of one encoder."""

    def __init__(
        self,
        encoder: Encoder,
        section: MuonSection,
        *,
        computing: Encoder | None = None,
        largest: Largest = lambda logits: logits,
    ) -> None:
        """`computing` makes the forward passes, where that is not `encoder`, whose weights are clipped; `largest` makes
        the maximum of this process the one of all."""
        self._encoder, self._section, self._largest = computing or encoder, section, largest
        self._blocks, self._observed = (
            [block for block in own.layers if isinstance(block, EncoderBlock)] for own in (encoder, self._encoder)
        )
        self._logits_LN: Tensor | None = None
        """Largest logits of the step so far, while a step is measured."""

        self._interval: tuple[Tensor, Tensor] | None = None
        """Largest logits since the last `read`, and which heads were clipped."""

    @contextmanager
    def measuring(self, step: int, num_micro_batches: int) -> Iterator[None]:
        """Around forward passes and optimizer step of a step, counted from 0; in most of them nothing happens."""
        if not clips_in_step(self._section, step):
            yield
            return
        config, device = self._encoder.config, self._encoder.embedding.weight.device
        shape = (config.num_hidden_layers, config.num_attention_heads)
        self._logits_LN = torch.full(shape, float("-inf"), device=device)
        self._passes_left = num_micro_batches
        self._encoder.observe = self._observe
        try:
            yield
        finally:
            self._encoder.observe = None
            self._logits_LN = None

    def clip_after(self, optimizer: Optimizer) -> None:
        """Has `optimizer.step()` end with clipping while a step is measured."""

        def clip(optimizer: Optimizer, *_: Any) -> None:
            # The flag is there once `step_unless` has made a step.
            self._clip(getattr(optimizer, "found_inf", None))

        optimizer.register_step_post_hook(clip)

    def read(self) -> dict[str, float]:
        """Of the steps measured since the last call: the largest logit and the number of heads that were clipped, by
        their names in the log; empty without any. Waits for the device."""
        if self._interval is None:
            return {}
        logits_LN, clipped_LN = self._interval
        self._interval = None
        return {"max_attention_logit": logits_LN.max().item(), "clipped_heads": int(clipped_LN.sum().item())}

    @torch.no_grad()
    def _observe(
        self,
        layer: int,
        x_TH: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        positions_BS: Tensor,
        segments: Segments,
    ) -> None:
        if not self._encoder.training:  # A pass of a teacher, with other weights.
            return
        if layer == 0:
            self._passes_left -= 1
        if self._section.capture_last_microbatch_only and self._passes_left:
            return
        assert self._logits_LN is not None, "observed outside of `measuring`"
        block, kind = self._observed[layer], x_TH.device.type
        if isinstance(block, FSDPModule):  # Its forward pass comes next, and finds the weights there.
            block.unshard()
            x_TH = x_TH.to(block.qkv.weight.dtype)  # As a policy of mixed precision has the block compute.
        # A weight that autocast converts here would be kept for the forward pass, and have no gradient there.
        with torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        ):
            q_TND, k_TND, _ = block.project(block.attention_norm(x_TH.detach()), rotation)
        found_N = largest_logits(
            q_TND * block.scale,
            k_TND,
            segments.ids,
            positions_BS,
            window=self._encoder.windows[layer],
            causal=segments.causal,
            chunk_size=self._section.clipping_qk_chunk_size,
        )
        self._logits_LN[layer] = torch.maximum(self._logits_LN[layer], found_N)

    @torch.no_grad()
    def _clip(self, found_inf: Tensor | None) -> None:
        if self._logits_LN is None:
            return
        logits_LN = self._largest(self._logits_LN)
        threshold, alpha = self._section.clipping_threshold, self._section.clipping_alpha
        exceeds_LN = (logits_LN > threshold) & torch.isfinite(logits_LN)
        if found_inf is not None:
            exceeds_LN &= found_inf == 0
        eta_LN = torch.where(exceeds_LN, threshold / logits_LN, 1.0)
        factors_L2N = torch.stack((eta_LN**alpha, eta_LN ** (1 - alpha)), dim=1)
        for block, factors_2N in zip(self._blocks, factors_L2N):
            scale_first_rows_(block.qkv.weight, factors_2N.flatten().repeat_interleave(block.head_dim))
        before = self._interval or (torch.full_like(logits_LN, float("-inf")), torch.zeros_like(exceeds_LN))
        if found_inf is not None:  # What a step that does not count had measured may be NaN.
            logits_LN = torch.where(found_inf == 0, logits_LN, before[0])
        self._interval = (torch.maximum(before[0], logits_LN), before[1] | exceeds_LN)


def scale_first_rows_(weight: Tensor, factors: Tensor) -> None:
    """Multiplies row i of `weight` with `factors[i]`, and leaves the rows after the last factor alone; of a weight that
    is sharded by rows, each rank those that it has."""
    first = first_row(weight)
    rows = local(weight)[: max(0, len(factors) - first)]
    rows.mul_(factors[first : first + len(rows), None])


def largest_logits(
    q_TND: Tensor,
    k_TND: Tensor,
    ids_BS: Tensor,
    positions_BS: Tensor,
    *,
    window: int | None,
    chunk_size: int,
    causal: bool = False,
) -> Tensor:
    """The largest product of a query and a key that it sees, `[N]` in fp32; -inf where there is no token.

    Args:
        q_TND: queries, scaled.
        ids_BS: segments, 0 for padding.
        positions_BS: of the tokens in their segments, for the sliding window and the order.
        chunk_size: queries whose products are in memory at once.
    """
    num_rows, num_slots = ids_BS.shape
    q_BNSD, k_BNSD = (x.unflatten(0, (num_rows, num_slots)).transpose(1, 2) for x in (q_TND, k_TND))
    found_N = q_TND.new_full((q_TND.shape[1],), float("-inf"), dtype=torch.float32)
    rows_at_once = max(1, chunk_size // num_slots)
    queries_at_once = min(chunk_size, num_slots)
    for row in range(0, num_rows, rows_at_once):
        rows = slice(row, row + rows_at_once)
        for first in range(0, num_slots, queries_at_once):
            queries = slice(first, first + queries_at_once)
            ids_BQ1, ids_B1S = ids_BS[rows, queries, None], ids_BS[rows, None]
            seen_BQS = (ids_BQ1 == ids_B1S) & (ids_B1S > 0)
            distance_BQS = positions_BS[rows, queries, None] - positions_BS[rows, None]
            if window is not None:
                seen_BQS &= distance_BQS.abs() <= window // 2
            if causal:
                seen_BQS &= distance_BQS >= 0
            logits_BNQS = q_BNSD[rows, :, queries] @ k_BNSD[rows].mT
            logits_BNQS.masked_fill_(~seen_BQS[:, None], float("-inf"))
            found_N = torch.maximum(found_N, logits_BNQS.amax((0, 2, 3)).float())
    return found_N
