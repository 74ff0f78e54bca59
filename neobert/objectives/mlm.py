"""Masked language modelling: the loss of guessing hidden tokens (which are hidden: `masking`).

The loss projects onto the vocabulary only the hidden states that are predicted.

Legend: B rows, S slots of a row, T = B * S, M predicted slots (static), H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neobert.kernels.linear_cross_entropy import LinearCrossEntropy
from neobert.model.encoder import Encoder
from neobert.model.heads import append_bias
from neobert.model.init import initialise
from neobert.model.ngpt import UnitMatrix, normalise_
from neobert.types import IGNORE_INDEX, LossSum, PackedBatch


class MaskedLM(nn.Module):
    """An encoder with a vocabulary projection; `forward` returns the summed loss, so that hooks of DDP and FSDP see it.

    With `tie_word_embeddings` the projection is the embedding matrix itself and there is no `decoder`. `decoder_bias`
    `[V]` is there where the config asks for it. With `ngpt` the logits are multiplied by `logit_scale` `[V]` over its
    base, s_z of `neobert.model.ngpt`.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        kernel: LinearCrossEntropy,
        all_positions: bool = False,
        count_correct: bool = False,
        z_loss: float = 0.0,
    ) -> None:
        """`kernel` is one of KERNELS. `all_positions` projects every slot, as an ablation: same loss, more work.

        `count_correct` counts correct predictions in training too; in evaluation mode they are always counted. `z_loss`
        is the coefficient of the squared logsumexp in the training loss; in evaluation mode it is left out.
        """
        super().__init__()
        self.encoder = encoder
        self.kernel = kernel
        self.all_positions = all_positions
        self.count_correct = count_correct
        self.z_loss = z_loss
        config = encoder.config
        self.decoder: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            initialise(self.decoder, config)
            normalise_(self.unit_matrices()[-1:])
        self.decoder_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.decoder_bias else None
        self.logit_scale: nn.Parameter | None = None
        if config.ngpt:
            self.logit_scale = nn.Parameter(torch.full((config.vocab_size,), config.scale_base))
        self.check_tied()

    @property
    def head_weight(self) -> Tensor:
        """The vocabulary projection `[V, H]`."""
        return self.encoder.embedding.weight if self.decoder is None else self.decoder.weight

    def unit_matrices(self) -> list[UnitMatrix]:
        """The matrices whose vectors have length 1 along a dimension, after every optimizer step too: with `ngpt`."""
        matrices = self.encoder.unit_matrices()
        return [*matrices, (self.decoder.weight, 1)] if matrices and self.decoder is not None else matrices

    def check_tied(self) -> None:
        """Raise RuntimeError when the weights are not tied as the config says. Run at build and after loading."""
        tied = self.head_weight is self.encoder.embedding.weight
        if tied != self.encoder.config.tie_word_embeddings:
            raise RuntimeError(
                f"model.tie_word_embeddings: {self.encoder.config.tie_word_embeddings}, but the vocabulary "
                f"projection {'is' if tied else 'is not'} the embedding matrix; build MaskedLM from the config of its "
                "weights"
            )

    def forward(self, batch: PackedBatch) -> LossSum:
        """Summed cross entropy of the batch's targets, in nats, and how many are predicted right when asked for."""
        hidden_TH = self.encoder(batch.input_ids, batch.positions, batch.segments)
        if self.all_positions:
            targets_T = batch.targets.new_full((hidden_TH.shape[0],), IGNORE_INDEX)
            # Unused places point at slot 0 with the lowest target there is: the maximum leaves real targets alone.
            targets = targets_T.scatter_reduce(0, batch.masked_index, batch.targets, reduce="amax")
            hidden = hidden_TH
        else:
            targets = batch.targets
            hidden = hidden_TH.index_select(0, batch.masked_index)
        loss_sum, num_correct = self.kernel(
            *self._with_bias(hidden, self._scaled_weight()),
            targets,
            ignore_index=IGNORE_INDEX,
            count_correct=self.count_correct or not self.training,
            z_loss=self.z_loss if self.training else 0.0,
        )
        return LossSum(loss_sum=loss_sum, num_correct=num_correct)

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits `[..., V]` of hidden states `[..., H]`, for prediction."""
        logits = F.linear(hidden, self.head_weight, self.decoder_bias)
        return logits if self.logit_scale is None else logits * (self.logit_scale / self.encoder.config.scale_base)

    def _scaled_weight(self) -> Tensor:
        """The projection with s_z in its rows: every loss kernel takes it, for one product of its size."""
        if self.logit_scale is None:
            return self.head_weight
        return self.head_weight * (self.logit_scale / self.encoder.config.scale_base)[:, None]

    def _with_bias(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return (hidden, weight) if self.decoder_bias is None else append_bias(hidden, weight, self.decoder_bias)
