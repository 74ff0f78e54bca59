"""Distillation: masked language modelling, and the outputs of a frozen teacher for the same masked rows.

    loss = w_mlm sum over targets of the cross entropy
         + w_logits T^2 sum over targets of KL(teacher, student), both softened by T
         + w_hidden p sum over tokens of 1 - cos(teacher's last hidden state, student's)

The three terms are those of DistilBERT (Sanh et al., arXiv 1910.01108, section 3). Where the widths differ, the
student's states go through a learned matrix first, as in TinyBERT (Jiao et al., arXiv 1909.10351, equation 8). p is
`datacollator.mlm_probability`: the loss of a step is divided by its targets, and so each term is a mean. Teacher and
student read the same tokens in the same segments.

What is trained is an ordinary masked language model. The matrix, `teacher_projection`, is of training only.

Legend: T slots of the stream, M predicted slots (static), H width of the student, E width of the teacher.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neobert.config.schema import Config
from neobert.config.schema_distill import DistillSection
from neobert.kernels.linear_cross_entropy import LinearCrossEntropy
from neobert.kernels.linear_distillation import chunked_linear_kl
from neobert.model.encoder import Encoder
from neobert.model.init import initialise
from neobert.objectives.base import EvalSums, ObjectiveModule, Teacher
from neobert.objectives.masking import mean_rate
from neobert.objectives.mlm import MLM, MaskedMetrics, with_bias
from neobert.objectives.mlm import build_metrics as build_masked_metrics
from neobert.types import IGNORE_INDEX, LossSum, PackedBatch

PROJECTION = "teacher_projection"
"""Name of the matrix between the widths."""


class DistilledMaskedLM(ObjectiveModule):
    """Predicts hidden tokens, and what its teacher says of them; `forward` returns the summed loss."""

    def __init__(
        self,
        encoder: Encoder,
        section: DistillSection,
        *,
        kernel: LinearCrossEntropy,
        token_weight: float,
        count_correct: bool = False,
    ) -> None:
        """`kernel` and `count_correct` are as of `MaskedLM`. `token_weight` is p, targets per token."""
        super().__init__(encoder)
        self.section, self.kernel = section, kernel
        self.token_weight, self.count_correct = token_weight, count_correct
        self.teacher_projection: nn.Linear | None = None

    def learn_from(self, teacher: Teacher) -> None:
        super().learn_from(teacher)
        ours, theirs = self.encoder.config.hidden_size, teacher.module.encoder.config.hidden_size
        if self.section.hidden_weight and ours != theirs:
            self.teacher_projection = nn.Linear(ours, theirs, bias=False)
            initialise(self.teacher_projection, self.encoder.config)

    def forward(self, batch: PackedBatch) -> LossSum:
        """The summed loss of the batch. In evaluation the cross entropy alone, and `counts`: targets for which both
        have the same first guess, the divergence, and 1 - cosine over all tokens; NaN where its weight is 0."""
        hidden_TH = self.encoder(batch.input_ids, batch.positions, batch.segments)
        hidden_MH = self.before_projection(hidden_TH.index_select(0, batch.masked_index))
        student = with_bias(self, hidden_MH)
        loss_sum, num_correct, _ = self.kernel(
            *student,
            batch.targets,
            ignore_index=IGNORE_INDEX,
            count_correct=self.count_correct or not self.training,
        )
        divergence, num_agreed, distance = self._compare(student, hidden_TH, batch)
        section = self.section
        if not self.training:
            predicted = loss_sum.new_tensor(0.0 if section.logits_weight else torch.nan)
            compared = loss_sum.new_tensor(0.0 if section.hidden_weight else torch.nan)
            counts = torch.stack([num_agreed + predicted, divergence + predicted, distance + compared])
            return LossSum(loss_sum=loss_sum, num_correct=num_correct, counts=counts)
        taught = section.logits_weight * divergence + section.hidden_weight * self.token_weight * distance
        total = section.mlm_weight * loss_sum + taught
        return LossSum(loss_sum=total, num_correct=num_correct, z_sum=(total - loss_sum).detach())

    def _compare(
        self, student: tuple[Tensor, Tensor], hidden_TH: Tensor, batch: PackedBatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Divergence, targets with the same first guess, and the distance of hidden states, fp32 sums."""
        teacher = self.teacher
        assert teacher is not None, "set before training"
        taught_TE = teacher.hidden_states(batch)
        divergence = num_agreed = distance = hidden_TH.new_zeros((), dtype=torch.float32)
        if self.section.logits_weight:
            with torch.no_grad(), teacher.autocast():
                picked_ME = taught_TE.index_select(0, batch.masked_index)
                theirs = with_bias(teacher.module, teacher.module.before_projection(picked_ME))
            (hidden_MH, weight_VH), (taught_ME, teacher_weight_VE) = student, theirs
            divergence, agreed = chunked_linear_kl(
                hidden_MH,
                weight_VH[: teacher.num_tokens],
                taught_ME,
                teacher_weight_VE[: teacher.num_tokens],
                batch.targets != IGNORE_INDEX,
                temperature=self.section.temperature,
                count_agreed=not self.training,
            )
            num_agreed = num_agreed if agreed is None else agreed
        if self.section.hidden_weight:
            states = hidden_TH if self.teacher_projection is None else self.teacher_projection(hidden_TH)
            distance_T = 1 - F.cosine_similarity(states.float(), taught_TE.float(), dim=-1)
            distance = torch.where(batch.segments.ids.flatten() > 0, distance_T, 0).sum()
        return divergence, num_agreed, distance


def build_distilled(encoder: Encoder, config: Config, kernel: LinearCrossEntropy) -> DistilledMaskedLM:
    """The module of a run, still without its teacher."""
    masks = config.datacollator
    return DistilledMaskedLM(
        encoder,
        config.distill,
        kernel=kernel,
        token_weight=mean_rate(masks.mlm_rate, masks.mlm_probability, masks.mlm_rate_range),
        count_correct=config.trainer.log_train_accuracy,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DistilledMetrics(MaskedMetrics):
    """Metrics over every masked token of the evaluation documents; the loss is the cross entropy."""

    agreement: float
    """Fraction of the masked tokens for which teacher and student have the same first guess; as the next one NaN
    without `distill.logits_weight`."""

    divergence: float
    """Mean KL in nats per masked token, softened and scaled as in training."""

    hidden_cosine: float
    """Mean cosine of the last hidden states; NaN without `distill.hidden_weight`."""

    def as_values(self) -> dict[str, float]:
        own = {f"eval/{name}": getattr(self, name) for name in ("agreement", "divergence", "hidden_cosine")}
        return MaskedMetrics.as_values(self) | own

    def describe(self) -> str:
        parts = [] if math.isnan(self.divergence) else [f"same guess {self.agreement:.2%}, KL {self.divergence:.4f}"]
        parts += [] if math.isnan(self.hidden_cosine) else [f"cosine of states {self.hidden_cosine:.4f}"]
        return f"{MaskedMetrics.describe(self)} | teacher: {', '.join(parts)}"


def build_metrics(sums: EvalSums) -> DistilledMetrics:
    """Means over the masked tokens, and of the cosine over all tokens."""
    num_agreed, divergence, distance = sums.counts
    return DistilledMetrics(
        **asdict(build_masked_metrics(sums)),
        agreement=num_agreed / max(sums.num_targets, 1),
        divergence=divergence / max(sums.num_targets, 1),
        hidden_cosine=1 - distance / max(sums.num_tokens, 1),
    )


# --- the card of an exported model ----------------------------------------------------------------------------------


def _describe_recipe(config: Config, sources: Sequence[str]) -> list[str]:
    section = config.distill
    taught = [f"predictions at temperature {section.temperature:g}"] if section.logits_weight else []
    taught += ["last hidden states"] if section.hidden_weight else []
    return [*MLM.card.recipe(config, sources), f"- distilled from a teacher: {' and '.join(taught)}"]


DISTILL = replace(
    MLM,
    name="distill",
    title="masked language modelling with a teacher",
    build_module=build_distilled,
    training_only=(f"{PROJECTION}.",),
    section="distill",
    num_counts=3,
    build_metrics=build_metrics,
    card=replace(MLM.card, recipe=_describe_recipe),
)
