"""Masked language modelling: which tokens are hidden, and the loss of guessing them.

Masking is a pure function of a row's tokens and of one 64-bit word per slot. Each row hides exactly
floor(p * maskable + offset) tokens: those with the smallest words. An offset uniform in [0, 1) makes that number
unbiased on short rows, which plain rounding is not. So the number of targets of a batch has a bound that depends on the
settings alone, and shapes stay static. The word, mixed once more, also says what stands in the place of a hidden token:
[MASK] in 80%, a random token in 10%, the token itself in 10% of cases (Devlin et al., arXiv 1810.04805), or always
[MASK] with `mask_all`.

The loss projects onto the vocabulary only the hidden states that are predicted.

Legend: B rows, S slots of a row, T = B * S, M predicted slots (static), H hidden size, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from neobert.kernels.linear_cross_entropy import LinearCrossEntropy
from neobert.model.encoder import Encoder
from neobert.model.heads import append_bias
from neobert.model.init import initialise
from neobert.model.ngpt import UnitMatrix, normalise_
from neobert.types import IGNORE_INDEX, LossSum, PackedBatch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MaskPolicy:
    """What is hidden and what stands in its place. Raises ValueError for settings that make no mask."""

    probability: float
    """Share of the maskable tokens that are predicted."""

    mask_all: bool
    """True: every predicted token becomes [MASK]. False: 80% [MASK], 10% a random token, 10% unchanged."""

    mask_token_id: int

    special_ids: tuple[int, ...]
    """Tokens that are never predicted: [CLS], [SEP], [PAD], [MASK] and the like, wherever they stand."""

    random_ids: NDArray[np.int32]
    """Tokens that a random replacement is drawn from, uniformly: the vocabulary without special tokens."""

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise ValueError(
                f"datacollator.mlm_probability: {self.probability} is outside (0, 1]; write a share such as 0.2"
            )
        if not self.mask_all and len(self.random_ids) == 0:
            raise ValueError(
                "datacollator.mask_all: false draws random replacements, and the vocabulary has special tokens only; "
                "write datacollator.mask_all: true or use another tokenizer"
            )
        if not self.mask_all and np.isin(self.random_ids, self.special_ids).any():
            raise ValueError("MaskPolicy.random_ids holds special tokens; leave them out")

    def corrupt(
        self, tokens: NDArray[np.int32], words: NDArray[np.uint64], offset: float
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Hide tokens of one row: `(corrupted i32[n], selected i64[k])`, `selected` ascending. Pure.

        `words` holds one uniform 64-bit word per token, `offset` is uniform in [0, 1).
        """
        is_special = np.zeros(len(tokens), dtype=bool)
        for special in self.special_ids:  # A handful: comparing with each is four times faster than np.isin.
            is_special |= tokens == special
        maskable = np.flatnonzero(~is_special)
        count = min(len(maskable), math.floor(self.probability * len(maskable) + offset))
        selected = maskable
        if count < len(maskable):
            selected = np.sort(maskable[np.argpartition(words[maskable], count)[:count]])
        corrupted = tokens.copy()
        if self.mask_all:
            corrupted[selected] = self.mask_token_id
            return corrupted, selected
        # Selected words are small numbers: mixed again, all their bits are uniform. The high half says what to do,
        # the low half draws the replacement, each scaled by multiply and shift.
        fresh = _mix(words[selected])
        tenth = ((fresh >> np.uint64(32)) * np.uint64(10)) >> np.uint64(32)
        drawn = ((fresh & np.uint64(0xFFFFFFFF)) * np.uint64(len(self.random_ids))) >> np.uint64(32)
        corrupted[selected[tenth < 8]] = self.mask_token_id
        corrupted[selected[tenth == 8]] = self.random_ids[drawn[tenth == 8]]
        return corrupted, selected

    def max_targets(self, num_slots: int) -> int:
        """Upper bound of the number of selected tokens in a row of `num_slots`."""
        return math.ceil(self.probability * num_slots) + 1


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea & Flood, 2014), a bijection of 64-bit words, after one step."""
    x = words + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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
