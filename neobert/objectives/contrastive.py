"""The encoder as an embedding model: texts of a step in, the summed loss out.

With several chunks the activations of one chunk at a time are kept: the embeddings are computed chunk by chunk without
a graph, and the backward computes a chunk again when the gradient of its embeddings is known. This is GradCache (Gao et
al., arXiv 2101.06983) as activation checkpointing of whole chunks, so the gradient is the one of the whole batch, for
a third more work, and hooks of DistributedDataParallel see one backward pass.

The names of the weights are those of `ObjectiveModule`: whatever loads a pretrained checkpoint loads one of these. A
learned temperature is one more.

Sets, order, collation and evaluation are in `neobert.contrastive`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neobert.config.schema import Config
from neobert.config.schema_contrastive import ContrastiveSection
from neobert.errors import StartupError
from neobert.kernels.linear_cross_entropy import KERNELS, LinearCrossEntropy
from neobert.model.encoder import Encoder
from neobert.model.pooling import choose_pooling
from neobert.objectives.base import Card, CardResult, Objective, ObjectiveModule, VectorSettings
from neobert.objectives.late_interaction import TOKENS, TokenVectors, Units, compare_pairs, join, shorten
from neobert.objectives.losses import (
    cosent,
    first_row,
    gather,
    gather_units,
    info_nce,
    similarity_error,
    sum_over_blocks,
    sup_con,
    vector_distance,
)
from neobert.objectives.mlm import MaskedLM, masked_loss
from neobert.objectives.pair_batch import PairBatch
from neobert.secrets import readable
from neobert.types import LossSum, PackedBatch

LARGEST_SCALE = 100.0
"""A learned temperature stays at or above 0.01, as in CLIP (Radford et al., arXiv 2103.00020, section 2.5)."""

TEMPERATURE = "log_scale"
"""Name of its logarithm, negated, among the weights."""


class ContrastiveEncoder(ObjectiveModule):
    """An encoder that is trained on pairs. An untied vocabulary projection stays as it is, unless some steps are masked
    language modelling."""

    def __init__(
        self, encoder: Encoder, section: ContrastiveSection, *, kernel: LinearCrossEntropy, z_loss: float = 0.0
    ) -> None:
        """`kernel` and `z_loss` are as of `MaskedLM`, for steps of masked language modelling."""
        super().__init__(encoder)
        self.section, self.kernel, self.z_loss = section, kernel, z_loss
        self.pool = _keep_tokens if section.pooling == TOKENS else choose_pooling(section.pooling)
        predicts = section.pretraining_prob > 0 and section.pretraining_objective == "mlm"
        for weight in self.projection_parameters():
            weight.requires_grad_(predicts)
        self.log_scale: nn.Parameter | None = None
        if section.learn_temperature:
            self.log_scale = nn.Parameter(torch.tensor(-math.log(section.temperature)))

    def forward(self, batch: PairBatch) -> LossSum:
        """The loss summed over the rows of the batch."""
        if batch.kind == "mlm":
            loss_sum = self._masked_loss(batch)
        else:
            vectors = self.embed(batch)
            with torch.autocast(batch.anchors.device.type, enabled=False):
                loss_sum = self._contrast(vectors, batch) if batch.kind != "distill" else self._imitate(vectors, batch)
        # Weights that this step has no use for take part with weight 0: gradients are reduced over all of them.
        unused = [p for p in (self.log_scale, *self.projection_parameters()) if p is not None and p.requires_grad]
        for parameter in unused:
            loss_sum = loss_sum + 0.0 * parameter.sum()
        return LossSum(loss_sum=loss_sum)

    def embed(self, batch: PairBatch) -> Units:
        """The vectors of all texts of a batch, fp32 `[texts, H]`, one chunk after the other; with pooling `tokens`
        those of all their tokens. Neither is scaled to length 1."""
        again = len(batch.chunks) > 1 and torch.is_grad_enabled()
        vectors = [
            checkpoint(self._embed_chunk, chunk, lengths, use_reentrant=False)
            if again
            else self._embed_chunk(chunk, lengths)
            for chunk, lengths in zip(batch.chunks, batch.lengths)
        ]
        joined = torch.cat(vectors)
        return TokenVectors(joined, torch.cat(batch.lengths)) if self.section.pooling == TOKENS else joined

    def _embed_chunk(self, chunk: PackedBatch, lengths: Tensor) -> Tensor:
        hidden = self.encoder(chunk.input_ids, chunk.positions, chunk.segments)
        return self.pool(hidden[: chunk.num_tokens].float(), lengths)

    def _imitate(self, vectors: Units, batch: PairBatch) -> Tensor:
        """The loss of every row's anchor and positive, the mean over both and over all widths."""
        assert isinstance(vectors, Tensor), "the config refuses pooling by tokens"
        taught, total = F.normalize(self._embed_taught(batch), dim=1), vectors.new_zeros(())
        widths = [*self.section.matryoshka_dims, self.encoder.config.hidden_size]
        for width in widths:
            units = F.normalize(vectors[:, :width], dim=1)
            for chosen in (batch.anchors, batch.positives):
                total = total + _imitate_at(units[chosen], taught[chosen])
        return total / (2 * len(widths))

    @torch.no_grad()
    def _embed_taught(self, batch: PairBatch) -> Tensor:
        """The teacher's vectors of all texts of a batch, fp32 `[texts, E]`."""
        teacher = self.teacher
        assert teacher is not None, "set before training"
        pool = choose_pooling(teacher.pooling)
        return torch.cat(
            [
                pool(teacher.hidden_states(chunk)[: chunk.num_tokens].float(), lengths)
                for chunk, lengths in zip(batch.chunks, batch.lengths)
            ]
        )

    def _masked_loss(self, batch: PairBatch) -> Tensor:
        def loss(chunk: PackedBatch) -> Tensor:
            z_loss = self.z_loss if self.training else 0.0
            return masked_loss(self, chunk, kernel=self.kernel, count_correct=False, z_loss=z_loss).loss_sum

        again = len(batch.chunks) > 1 and torch.is_grad_enabled()
        losses = [checkpoint(loss, c, use_reentrant=False) if again else loss(c) for c in batch.chunks]
        return torch.stack(losses).sum()

    @property
    def scale(self) -> Tensor | float:
        """1 / temperature."""
        if self.log_scale is None:
            return 1 / self.section.temperature
        return self.log_scale.exp().clamp(max=LARGEST_SCALE)

    def _contrast(self, vectors: Units, batch: PairBatch) -> Tensor:
        """The mean of the losses at every width."""
        widths = [*self.section.matryoshka_dims, self.encoder.config.hidden_size]
        losses = [self._contrast_at(shorten(vectors, width), batch) for width in widths]
        return torch.stack(losses).mean()

    def _contrast_at(self, units: Units, batch: PairBatch) -> Tensor:
        anchors = units[batch.anchors]
        if batch.kind == "supcon":
            own = _own_indices(batch, len(anchors))
            everything, classes = gather_units(anchors), gather(batch.scores)

            def loss(anchors: Units, own_classes: Tensor, own: Tensor) -> Tensor:
                return sup_con(anchors, everything, own_classes, classes, own, scale=self.scale)

            return sum_over_blocks(loss, anchors, batch.scores, own)
        positives = units[batch.positives]
        if batch.kind == "cosent":
            similarities, scores = gather(compare_pairs(anchors, positives)), gather(batch.scores)
            return len(anchors) * cosent(similarities, scores, scale=self.scale)
        total = self._find_positives(units, anchors, positives, batch)
        if self.section.both_directions:
            total = (total + self._find_anchors(anchors, positives, batch)) / 2
        return total

    def _find_positives(self, units: Units, anchors: Units, positives: Units, batch: PairBatch) -> Tensor:
        """Every anchor against the positives of all rows, then the negatives of all rows."""
        num_rows, num_negatives = batch.negatives.shape
        candidates, ids = positives, batch.text_ids[batch.positives]
        absent = torch.zeros_like(batch.anchors, dtype=torch.bool)
        if num_negatives:
            negatives = batch.negatives.flatten()
            candidates = join([positives, units[negatives]])
            ids = torch.cat([ids, batch.text_ids[negatives]])
            absent = torch.cat([absent, ~batch.has_negative.flatten()])
        begin = first_row(len(candidates))
        own = begin + torch.arange(num_rows, device=ids.device)
        own_negatives = begin + num_rows + torch.arange(num_rows * num_negatives, device=ids.device)
        everything, all_ids, all_absent = gather_units(candidates), gather(ids), gather(absent.to(torch.uint8)).bool()
        weight = self.section.hard_negative_weight

        def loss(
            anchors: Units, own: Tensor, anchor_ids: Tensor, positive_ids: Tensor, own_negatives: Tensor
        ) -> Tensor:
            bonus = None
            if num_negatives and weight:
                bonus = batch.scores.new_zeros(len(anchors), len(all_ids)).scatter_(1, own_negatives, weight)
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
        return sum_over_blocks(
            loss, anchors, own, anchor_ids, positive_ids, own_negatives.view(num_rows, num_negatives)
        )

    def _find_anchors(self, anchors: Units, positives: Units, batch: PairBatch) -> Tensor:
        """Every positive against the anchors of all rows."""
        own = _own_indices(batch, len(anchors))
        ids, positive_ids = batch.text_ids[batch.anchors], batch.text_ids[batch.positives]
        everything, all_ids = gather_units(anchors), gather(ids)

        def loss(positives: Units, own: Tensor, ids: Tensor, positive_ids: Tensor) -> Tensor:
            excluded = _same_text(all_ids, positive_ids, ids).scatter(1, own[:, None], False)
            margin = self.section.false_negative_margin
            return info_nce(positives, everything, own, excluded, scale=self.scale, margin=margin)

        return sum_over_blocks(loss, positives, own, ids, positive_ids)


def _imitate_at(units: Tensor, taught: Tensor) -> Tensor:
    """Vector by vector where both have one width, or else by the similarities of all texts of the step."""
    if units.shape == taught.shape:
        return vector_distance(units, taught)
    everything, all_taught = gather(units), gather(taught)

    def loss(units: Tensor, taught: Tensor) -> Tensor:
        return similarity_error(units, taught, everything, all_taught)

    return sum_over_blocks(loss, units, taught)


def _keep_tokens(hidden_TH: Tensor, lengths_N: Tensor) -> Tensor:
    """Where the other poolings make one vector a text."""
    return hidden_TH


def _own_indices(batch: PairBatch, num_rows: int) -> Tensor:
    return first_row(num_rows) + torch.arange(num_rows, device=batch.anchors.device)


def _same_text(candidates_M: Tensor, *ids_N: Tensor) -> Tensor:
    """bool `[N, M]`: candidates with the very text of one of the row's own."""
    return torch.stack([candidates_M == ids[:, None] for ids in ids_N]).any(dim=0)


def build_contrastive(encoder: Encoder, config: Config, kernel: LinearCrossEntropy) -> ContrastiveEncoder:
    """The module of a run.

    Raises:
        StartupError: `contrastive.matryoshka_dims` is wider than the encoder.
    """
    section, width = config.contrastive, encoder.config.hidden_size
    if any(dim >= width for dim in section.matryoshka_dims):
        raise StartupError(
            f"contrastive.matryoshka_dims: {list(section.matryoshka_dims)} must be less than the width of the model,"
            f" {width}, which is always trained"
        )
    return ContrastiveEncoder(encoder, section, kernel=kernel, z_loss=config.trainer.z_loss)


def choose_vectors(config: Config) -> VectorSettings:
    """As the model was fine-tuned."""
    section = config.contrastive
    prompts = {"query": section.anchor_prefix, "document": section.positive_prefix}
    return VectorSettings(
        max_length=config.dataset.max_seq_length,
        pooling=section.pooling,
        prompts=tuple((name, text) for name, text in prompts.items() if text is not None),
    )


# --- the card of an exported model ----------------------------------------------------------------------------------


def _describe_recipe(config: Config, sources: Sequence[str]) -> list[str]:
    section = config.contrastive
    sets = ", ".join(sources) or f"all sets prepared in {readable(str(config.dataset.path))}"
    return [
        f"- fine-tuned on pairs of {sets}",
        f"- texts of at most {config.dataset.max_seq_length} tokens, {_describe_vectors(section)}",
        f"- loss: {_LOSSES[section.loss_type]}{''.join(f'; {option}' for option in _list_options(section))}",
        f"- temperature {section.temperature:g}{' at the start, then learned' if section.learn_temperature else ''}",
    ]


def _describe_vectors(section: ContrastiveSection) -> str:
    return "compared token by token (MaxSim)" if section.pooling == TOKENS else f"{section.pooling} pooling"


_LOSSES = {
    "auto": "InfoNCE for pairs, CoSENT for scored pairs, SupCon for texts with labels",
    "infonce": "InfoNCE",
    "simcse": "SimCSE (every text against itself under another dropout mask)",
    "supcon": "SupCon",
    "cosent": "CoSENT",
    "distill": "the vectors of a teacher",
}


def _list_options(section: ContrastiveSection) -> Iterator[str]:
    if section.num_hard_negatives:
        negatives = "hard negative" if section.num_hard_negatives == 1 else "hard negatives"
        yield f"up to {section.num_hard_negatives} {negatives} a pair"
    if section.both_directions:
        yield "in both directions"
    if section.matryoshka_dims:
        yield f"at widths {', '.join(map(str, section.matryoshka_dims))} too"
    if section.pretraining_prob:
        texts, fraction = readable(str(section.pretraining_dataset)), section.pretraining_prob
        yield f"{section.pretraining_objective} on texts of {texts} in {fraction:.0%} of the steps"


def _describe_evaluation(line: Mapping[str, Any]) -> list[str]:
    return [
        f"- {key} at step {line['step']:,}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        for key, metrics in line["sets"].items()
    ]


def _list_results(line: Mapping[str, Any]) -> Iterator[CardResult]:
    for key, metrics in line["sets"].items():
        for metric, value in metrics.items():
            yield CardResult("sentence-similarity", key, metric, value, None)


CONTRASTIVE = Objective(
    name="contrastive",
    task="contrastive",
    command="finetune",
    title="contrastive fine-tuning",
    build_module=build_contrastive,
    # Its encoder still has the vocabulary projection that it was pretrained with.
    build_trained=lambda encoder, head: MaskedLM(encoder, kernel=KERNELS["torch"]),
    training_only=(TEMPERATURE,),
    predicts_tokens=False,
    fills_masks=True,
    reads="pairs",
    section="contrastive",
    vectors=choose_vectors,
    job="neobert.contrastive.finetune:FINETUNING",
    answers="neobert.inference.fill_mask:MASK_ANSWERS",
    card=Card(
        summary="An encoder fine-tuned to give texts of like meaning vectors with a large cosine.",
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=("sentence-transformers", "feature-extraction", "encoder"),
        recipe=_describe_recipe,
        evaluation=_describe_evaluation,
        results=_list_results,
    ),
)
