"""Masked language modelling that also predicts hidden states: those that an average of the encoder has without masks.

    loss = cross entropy of the masked tokens + weight * sum over them of 1 - cos(predictor(h), t)

h is the hidden state of a masked slot and t the one that the teacher has there, which sees the text without masks: the
encoder with the moving average of the weights, `trainer.ema_decay` (data2vec, Baevski et al., arXiv 2202.03555, with
one layer as target; the distance and a predictor beside a token loss as in LLM-JEPA, Huang et al., arXiv 2509.14252).
The teacher has no dropout and gets no gradient. An average is part of a checkpoint, so a resumed run continues exactly.

The predictor, a layer as wide as the encoder, GELU and another one, is of training only. Evaluations are those of
masked language modelling, and so is everything that a trained model answers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.kernels.linear_cross_entropy import KERNELS, LinearCrossEntropy
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.init import initialise
from neobert.objectives.mlm import MLM, MaskedLM, loss_options, masked_loss
from neobert.types import IGNORE_INDEX, LossSum, PackedBatch

_ENCODER = "encoder."


class Predictor(nn.Module):
    """From a hidden state of the student to one of the teacher."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        for layer in (self.dense, self.out):
            initialise(layer, config)

    def forward(self, hidden: Tensor) -> Tensor:
        """Of hidden states `[..., H]`, in the same shape."""
        predicted: Tensor = self.out(F.gelu(self.dense(hidden)))
        return predicted


class MaskedJEPA(MaskedLM):
    """Predicts hidden tokens and what a teacher makes of them; `forward` returns the summed loss."""

    def __init__(self, encoder: Encoder, *, jepa_weight: float = 1.0, **options: Any) -> None:
        """`options` are those of MaskedLM."""
        super().__init__(encoder, **options)
        self.jepa_weight = jepa_weight
        self.predictor = Predictor(encoder.config)
        self._teacher: Callable[[], Mapping[str, Tensor]] | None = None

    def learn_from_average(self, average: Callable[[], Mapping[str, Tensor]] | None) -> None:
        """`average` gives the weights of the teacher, by the names of this module.

        Raises:
            StartupError: there is none.
        """
        if average is None:
            raise StartupError(
                "trainer.objective: mlm_jepa learns from an average of the weights; set trainer.ema_decay, such as 0.99"
            )
        self._teacher = average

    def forward(self, batch: PackedBatch) -> LossSum:
        """As that of MaskedLM; in training with the distances to the teacher's hidden states in `loss_sum`."""
        if not self.training or self._teacher is None:  # Measurements have no teacher.
            return super().forward(batch)
        hidden_TH = self.encoder(batch.input_ids, batch.positions, batch.segments)
        tokens = masked_loss(
            self,
            batch,
            kernel=self.kernel,
            all_positions=self.all_positions,
            count_correct=self.count_correct,
            z_loss=self.z_loss,
            hidden_TH=hidden_TH,
        )
        taught = self.jepa_weight * self.distances(hidden_TH, batch, self._teacher()).sum()
        return replace(tokens, loss_sum=tokens.loss_sum + taught, z_sum=taught.detach())

    def distances(self, hidden_TH: Tensor, batch: PackedBatch, teacher: Mapping[str, Tensor]) -> Tensor:
        """1 - cos of the predicted hidden state of each target and the teacher's, fp32 `[M]`; 0 in unused entries."""
        weights = {name.removeprefix(_ENCODER): x for name, x in teacher.items() if name.startswith(_ENCODER)}
        arguments = restore_tokens(batch), batch.positions, batch.segments
        self.encoder.eval()
        with torch.no_grad():
            targets_TH: Tensor = functional_call(self.encoder, weights, arguments)
        self.encoder.train()
        predicted_MH = self.predictor(hidden_TH.index_select(0, batch.masked_index)).float()
        targets_MH = targets_TH.index_select(0, batch.masked_index).float()
        distances_M = 1 - F.cosine_similarity(predicted_MH, targets_MH, dim=-1)
        return torch.where(batch.targets != IGNORE_INDEX, distances_M, 0)


def restore_tokens(batch: PackedBatch) -> Tensor:
    """The tokens `[B, S]` of a batch as they were before masks. Unused entries of the targets point at slot 0, a [CLS]
    or padding that is never hidden, and write what is there."""
    fed_T = batch.input_ids.flatten()
    at_index_M = fed_T.index_select(0, batch.masked_index)
    tokens_M = torch.where(batch.targets != IGNORE_INDEX, batch.targets.to(fed_T.dtype), at_index_M)
    return fed_T.scatter(0, batch.masked_index, tokens_M).view_as(batch.input_ids)


def build_masked_jepa(encoder: Encoder, config: Config, kernel: LinearCrossEntropy) -> MaskedJEPA:
    """The module of a run."""
    return MaskedJEPA(encoder, kernel=kernel, jepa_weight=config.trainer.jepa_weight, **loss_options(config))


def _describe_recipe(config: Config, sources: Sequence[str]) -> list[str]:
    weight = config.trainer.jepa_weight
    taught = f"- hidden states of an average of the encoder predicted too, with weight {weight:g}"
    return [*MLM.card.recipe(config, sources), taught]


MLM_JEPA = replace(
    MLM,
    name="mlm_jepa",
    title="masked language modelling with predicted hidden states",
    build_module=build_masked_jepa,
    build_trained=lambda encoder, head: MaskedJEPA(encoder, kernel=KERNELS["torch"]),
    training_only=("predictor.",),
    card=replace(MLM.card, recipe=_describe_recipe),
)
