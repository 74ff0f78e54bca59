"""The encoder as an embedding model: texts of a step in, the summed loss out.

With several chunks the activations of one chunk at a time are kept: the embeddings are computed chunk by chunk without
a graph, and the backward computes a chunk again when the gradient of its embeddings is known. This is GradCache (Gao et
al., arXiv 2101.06983) as activation checkpointing of whole chunks, so the gradient is the one of the whole batch, for
a third more work, and hooks of DistributedDataParallel see one backward pass.

The names of the weights are those of `MaskedLM`: whatever loads a pretrained checkpoint loads one of these. A learned
temperature is one more.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neobert.config.schema_contrastive import ContrastiveSection
from neobert.contrastive.batches import PairBatch
from neobert.contrastive.losses import cosent, first_row, gather, info_nce, sum_over_blocks, sup_con
from neobert.inference.pooling import choose_pooling
from neobert.kernels.linear_cross_entropy import LinearCrossEntropy
from neobert.model.encoder import Encoder
from neobert.objectives.mlm import MaskedLM
from neobert.types import LossSum, PackedBatch

LARGEST_SCALE = 100.0
"""A learned temperature stays at or above 0.01, as in CLIP (Radford et al., arXiv 2103.00020, section 2.5)."""

TEMPERATURE = "log_scale"
"""Name of its logarithm, negated, among the weights; see `neobert.weights.load.TRAINING_ONLY`."""


class ContrastiveEncoder(MaskedLM):
    """An encoder that is trained on pairs; `forward` takes a `PairBatch`, and a `PackedBatch` as `MaskedLM` does."""

    def __init__(
        self, encoder: Encoder, section: ContrastiveSection, *, kernel: LinearCrossEntropy, z_loss: float = 0.0
    ) -> None:
        super().__init__(encoder, kernel=kernel, z_loss=z_loss)
        self.section = section
        self.pool = choose_pooling(section.pooling)
        if self.decoder is not None:  # It stays as it is where no step is masked language modelling.
            self.decoder.requires_grad_(section.pretraining_prob > 0 and section.pretraining_objective == "mlm")
        self.log_scale: nn.Parameter | None = None
        if section.learn_temperature:
            self.log_scale = nn.Parameter(torch.tensor(-math.log(section.temperature)))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As always; a pretrained encoder has no temperature, which then keeps its first value."""
        if self.log_scale is not None and TEMPERATURE not in state_dict:
            state_dict = {**state_dict, TEMPERATURE: self.log_scale.detach()}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def forward(self, batch: PairBatch | PackedBatch) -> LossSum:
        """The loss summed over the rows of the batch."""
        if isinstance(batch, PackedBatch):
            return super().forward(batch)
        if batch.kind == "mlm":
            loss_sum = self._masked_loss(batch)
        else:
            vectors = self.embed(batch)
            with torch.autocast(vectors.device.type, enabled=False):
                loss_sum = self._contrast(vectors, batch)
        # Weights that this step has no use for take part with weight 0: gradients are reduced over all of them.
        unused = [p for p in (self.log_scale, self._own_head()) if p is not None and p.requires_grad]
        for parameter in unused:
            loss_sum = loss_sum + 0.0 * parameter.sum()
        return LossSum(loss_sum=loss_sum)

    def embed(self, batch: PairBatch) -> Tensor:
        """The vectors of all texts of a batch, fp32 `[texts, H]`, one chunk after the other."""
        again = len(batch.chunks) > 1 and torch.is_grad_enabled()
        vectors = [
            checkpoint(self._embed_chunk, chunk, lengths, use_reentrant=False)
            if again
            else self._embed_chunk(chunk, lengths)
            for chunk, lengths in zip(batch.chunks, batch.lengths)
        ]
        return torch.cat(vectors)

    def _embed_chunk(self, chunk: PackedBatch, lengths: Tensor) -> Tensor:
        hidden = self.encoder(chunk.input_ids, chunk.positions, chunk.segments)
        return self.pool(hidden[: chunk.num_tokens].float(), lengths)

    def _masked_loss(self, batch: PairBatch) -> Tensor:
        def loss(chunk: PackedBatch) -> Tensor:
            return MaskedLM.forward(self, chunk).loss_sum

        again = len(batch.chunks) > 1 and torch.is_grad_enabled()
        losses = [checkpoint(loss, c, use_reentrant=False) if again else loss(c) for c in batch.chunks]
        return torch.stack(losses).sum()

    def _own_head(self) -> Tensor | None:
        return None if self.decoder is None else self.decoder.weight

    @property
    def scale(self) -> Tensor | float:
        """1 / temperature."""
        if self.log_scale is None:
            return 1 / self.section.temperature
        return self.log_scale.exp().clamp(max=LARGEST_SCALE)

    def _contrast(self, vectors: Tensor, batch: PairBatch) -> Tensor:
        """The mean of the losses at every width."""
        widths = [*self.section.matryoshka_dims, vectors.shape[1]]
        losses = [self._contrast_at(F.normalize(vectors[:, :width], dim=1), batch) for width in widths]
        return torch.stack(losses).mean()

    def _contrast_at(self, units: Tensor, batch: PairBatch) -> Tensor:
        anchors = units[batch.anchors]
        if batch.kind == "supcon":
            own = _own_places(batch, len(anchors))
            everything, classes = gather(anchors), gather(batch.scores)

            def loss(anchors: Tensor, own_classes: Tensor, own: Tensor) -> Tensor:
                return sup_con(anchors, everything, own_classes, classes, own, scale=self.scale)

            return sum_over_blocks(loss, anchors, batch.scores, own)
        positives = units[batch.positives]
        if batch.kind == "cosent":
            similarities, scores = gather((anchors * positives).sum(dim=1)), gather(batch.scores)
            return len(anchors) * cosent(similarities, scores, scale=self.scale)
        total = self._find_positives(units, anchors, positives, batch)
        if self.section.both_directions:
            total = (total + self._find_anchors(anchors, positives, batch)) / 2
        return total

    def _find_positives(self, units: Tensor, anchors: Tensor, positives: Tensor, batch: PairBatch) -> Tensor:
        """Every anchor against the positives of all rows, then the negatives of all rows."""
        num_rows, num_negatives = batch.negatives.shape
        candidates, ids = positives, batch.text_ids[batch.positives]
        absent = torch.zeros_like(batch.anchors, dtype=torch.bool)
        if num_negatives:
            negatives = batch.negatives.flatten()
            candidates = torch.cat([positives, units[negatives]])
            ids = torch.cat([ids, batch.text_ids[negatives]])
            absent = torch.cat([absent, ~batch.has_negative.flatten()])
        begin = first_row(len(candidates))
        own = begin + torch.arange(num_rows, device=units.device)
        places = begin + num_rows + torch.arange(num_rows * num_negatives, device=units.device)
        everything, all_ids, all_absent = gather(candidates), gather(ids), gather(absent.to(torch.uint8)).bool()
        weight = self.section.hard_negative_weight

        def loss(anchors: Tensor, own: Tensor, anchor_ids: Tensor, positive_ids: Tensor, places: Tensor) -> Tensor:
            bonus = None
            if num_negatives and weight:
                bonus = anchors.new_zeros(len(anchors), len(all_ids)).scatter_(1, places, weight)
            return info_nce(
                anchors,
                everything,
                own,
                (all_absent | _same_text(all_ids, anchor_ids, positive_ids)).scatter(1, own[:, None], False),
                scale=self.scale,
                bonus_NM=bonus,
                margin=self.section.false_negative_margin,
            )

        anchor_ids, positive_ids = batch.text_ids[batch.anchors], batch.text_ids[batch.positives]
        return sum_over_blocks(loss, anchors, own, anchor_ids, positive_ids, places.view(num_rows, num_negatives))

    def _find_anchors(self, anchors: Tensor, positives: Tensor, batch: PairBatch) -> Tensor:
        """Every positive against the anchors of all rows."""
        own = _own_places(batch, len(anchors))
        ids, positive_ids = batch.text_ids[batch.anchors], batch.text_ids[batch.positives]
        everything, all_ids = gather(anchors), gather(ids)

        def loss(positives: Tensor, own: Tensor, ids: Tensor, positive_ids: Tensor) -> Tensor:
            excluded = _same_text(all_ids, positive_ids, ids).scatter(1, own[:, None], False)
            margin = self.section.false_negative_margin
            return info_nce(positives, everything, own, excluded, scale=self.scale, margin=margin)

        return sum_over_blocks(loss, positives, own, ids, positive_ids)


def _own_places(batch: PairBatch, num_rows: int) -> Tensor:
    return first_row(num_rows) + torch.arange(num_rows, device=batch.anchors.device)


def _same_text(candidates_M: Tensor, *ids_N: Tensor) -> Tensor:
    """bool `[N, M]`: candidates with the very text of one of the row's own."""
    return torch.stack([candidates_M == ids[:, None] for ids in ids_N]).any(dim=0)
