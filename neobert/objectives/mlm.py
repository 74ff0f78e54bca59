"""Masked language modelling: the loss of guessing hidden tokens (which are hidden: `masking`).

The loss projects onto the vocabulary only the hidden states that are predicted.

Legend: B rows, S slots of a row, T = B * S, M predicted slots (static), H hidden size, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neobert.config.schema import Config
from neobert.config.schema_data import DatacollatorSection
from neobert.kernels.linear_cross_entropy import KERNELS, LinearCrossEntropy
from neobert.model.encoder import Encoder
from neobert.objectives.base import Card, CardResult, EvalSums, Objective, ObjectiveModule
from neobert.types import IGNORE_INDEX, LossSum, PackedBatch


class MaskedLM(ObjectiveModule):
    """Predicts hidden tokens; `forward` returns the summed loss."""

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
        super().__init__(encoder)
        self.kernel = kernel
        self.all_positions = all_positions
        self.count_correct = count_correct
        self.z_loss = z_loss

    def forward(self, batch: PackedBatch) -> LossSum:
        """Summed cross entropy of the batch's targets, in nats, and how many are predicted right when asked for."""
        return masked_loss(
            self,
            batch,
            kernel=self.kernel,
            all_positions=self.all_positions,
            count_correct=self.count_correct or not self.training,
            z_loss=self.z_loss if self.training else 0.0,
        )


def masked_loss(
    module: ObjectiveModule,
    batch: PackedBatch,
    *,
    kernel: LinearCrossEntropy,
    all_positions: bool = False,
    count_correct: bool,
    z_loss: float,
    hidden_TH: Tensor | None = None,
) -> LossSum:
    """Summed cross entropy of the batch's targets under the module's vocabulary projection; see `MaskedLM`.

    `hidden_TH`: the hidden states of the batch, where the caller has them.
    """
    if hidden_TH is None:
        hidden_TH = module.encoder(batch.input_ids, batch.positions, batch.segments)
    if all_positions:
        targets_T = batch.targets.new_full((hidden_TH.shape[0],), IGNORE_INDEX)
        # Unused entries point at slot 0 with the lowest target there is: the maximum leaves real targets alone.
        targets = targets_T.scatter_reduce(0, batch.masked_index, batch.targets, reduce="amax")
        hidden = hidden_TH
    else:
        targets = batch.targets
        hidden = hidden_TH.index_select(0, batch.masked_index)
    loss_sum, num_correct, z_sum = kernel(
        *with_bias(module, module.before_projection(hidden)),
        targets,
        ignore_index=IGNORE_INDEX,
        count_correct=count_correct,
        z_loss=z_loss,
    )
    return LossSum(loss_sum=loss_sum, num_correct=num_correct, z_sum=z_sum)


LOGITS_BYTES = 64 * 2**20
"""fp32 logits that exist at once where no kernel computes the loss."""


def target_losses(module: ObjectiveModule, batch: PackedBatch) -> Tensor:
    """Cross entropy of each target, fp32 `[M]`; 0 in unused entries."""
    return _for_targets(
        module,
        batch,
        lambda logits, targets: F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none"),
    )


def target_hits(module: ObjectiveModule, batch: PackedBatch) -> Tensor:
    """Whether each target is the most likely token, bool `[M]`; False in unused entries."""
    return _for_targets(module, batch, lambda logits, targets: logits.argmax(dim=-1) == targets)


def _for_targets(module: ObjectiveModule, batch: PackedBatch, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`[M]`: what `function` makes of the logits, fp32 `[m, V]`, and the targets `[m]`, some at a time."""
    hidden_TH = module.encoder(batch.input_ids, batch.positions, batch.segments)
    hidden_MH = hidden_TH.index_select(0, batch.masked_index)
    step = max(1, LOGITS_BYTES // (4 * module.encoder.config.vocab_size))
    return torch.cat(
        [
            function(module.logits(hidden).float(), targets)
            for hidden, targets in zip(hidden_MH.split(step), batch.targets.split(step))
        ]
    )


def with_bias(module: ObjectiveModule, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and projection whose product is the logits: s_z is in its rows, a bias in one more column, so that
    every loss kernel takes them."""
    weight = module.head_weight
    if module.logit_scale is not None:
        weight = weight * (module.logit_scale / module.encoder.config.scale_base)[:, None]
    return (hidden, weight) if module.decoder_bias is None else append_bias(hidden, weight, module.decoder_bias)


def build_masked_lm(encoder: Encoder, config: Config, kernel: LinearCrossEntropy) -> MaskedLM:
    """The module of a run."""
    return MaskedLM(encoder, kernel=kernel, **loss_options(config))


def loss_options(config: Config) -> dict[str, Any]:
    """Of a MaskedLM, and of what extends it."""
    trainer = config.trainer
    return {
        "z_loss": trainer.z_loss,
        "all_positions": not trainer.masked_logits_only_loss,
        "count_correct": trainer.log_train_accuracy,
    }


def perplexity(loss: float) -> float:
    """`exp(loss)`, infinity where it would overflow."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedMetrics:
    """Metrics over every masked token of the evaluation documents."""

    loss: float
    """Mean cross entropy in nats per masked token."""

    accuracy: float
    num_targets: int
    num_tokens: int
    num_documents: int

    @property
    def criterion(self) -> float:
        return self.loss

    def as_line(self) -> dict[str, Any]:
        return asdict(self)

    def as_values(self) -> dict[str, float]:
        return {
            "eval/loss": self.loss,
            "eval/perplexity": perplexity(self.loss),
            "eval/accuracy": self.accuracy,
        }

    def describe(self) -> str:
        return (
            f"loss {self.loss:.4f} | ppl {perplexity(self.loss):.2f} | accuracy {self.accuracy:.2%} | "
            f"{self.num_targets:,} masked tokens of {self.num_documents:,} documents"
        )


def build_metrics(sums: EvalSums) -> MaskedMetrics:
    """Means over the masked tokens."""
    return MaskedMetrics(
        loss=sums.loss_sum / max(sums.num_targets, 1),
        accuracy=sums.num_correct / max(sums.num_targets, 1),
        num_targets=sums.num_targets,
        num_tokens=sums.num_tokens,
        num_documents=sums.num_documents,
    )


def describe_baseline(config: Config, unigram_entropy: Callable[[], float]) -> str:
    """The loss of a model that sees no context."""
    return f"entropy   {unigram_entropy():.4f} nats: loss of a model that knows only token frequencies"


# --- the card of an exported model ----------------------------------------------------------------------------------

UNITS_IN_WORDS = {"tokens": "", "words": " by whole words", "spans": " by spans of words"}
"""`datacollator.mask_units`, after a fraction of the tokens."""


def describe_rows(config: Config, sources: Sequence[str]) -> list[str]:
    """Data and rows, for an objective over documents."""
    rows = "packed" if config.datacollator.pack_sequences else "one document each"
    return [f"- data: {', '.join(sources)}", f"- rows of {config.dataset.max_seq_length} tokens, {rows}"]


def describe_rate(masks: DatacollatorSection) -> str:
    """The fraction of the tokens that are drawn: `15%`, `30% to 15%`, or `5% to 50% (random)`."""
    if masks.mlm_rate != "fixed":
        lowest, highest = masks.mlm_rate_range
        return f"{lowest:.0%} to {highest:.0%} ({masks.mlm_rate})"
    first, last = masks.mlm_probability, masks.mlm_probability_final
    return f"{first:.0%}" if last is None else f"{first:.0%} to {last:.0%}"


def _describe_recipe(config: Config, sources: Sequence[str]) -> list[str]:
    masks = config.datacollator
    predicted = f"- {describe_rate(masks)} of the tokens predicted{UNITS_IN_WORDS[masks.mask_units]}, {_mix(masks)}"
    if masks.mask_weights == "adaptive":
        predicted += ", more often those that it predicted badly"
    return [*describe_rows(config, sources), predicted]


def _mix(masks: DatacollatorSection) -> str:
    if masks.mask_all:
        return "all of them as masks"
    masked, drawn = masks.mask_fraction, masks.random_fraction
    return f"{masked:.0%} as masks, {drawn:.0%} as random tokens, {max(0.0, 1 - masked - drawn):.0%} unchanged"


def _describe_evaluation(line: Mapping[str, Any]) -> list[str]:
    if line["loss"] is None:  # A number that was not finite.
        return []
    return [
        f"- held-out loss at step {line['step']:,}: {line['loss']:.4f} nats per masked token, "
        f"{line['accuracy']:.1%} predicted exactly ({line['num_targets']:,} masked tokens)"
    ]


def _list_results(line: Mapping[str, Any]) -> Iterator[CardResult]:
    labels = {"loss": "nats per masked token", "accuracy": "masked tokens predicted exactly"}
    for metric, label in labels.items():
        if line[metric] is not None:
            yield CardResult("fill-mask", None, metric, line[metric], label)


MLM = Objective(
    name="mlm",
    task="pretraining",
    command="pretrain",
    title="masked language modelling",
    build_module=build_masked_lm,
    build_trained=lambda encoder, head: MaskedLM(encoder, kernel=KERNELS["torch"]),
    predicts_tokens=True,
    fills_masks=True,
    reads="documents",
    build_metrics=build_metrics,
    target_losses=target_losses,
    describe_baseline=describe_baseline,
    job="neobert.train.pretraining:PRETRAINING",
    answers="neobert.inference.fill_mask:MASK_ANSWERS",
    card=Card(
        summary="An encoder trained with masked language modelling.",
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=("masked-lm", "encoder"),
        recipe=_describe_recipe,
        evaluation=_describe_evaluation,
        results=_list_results,
    ),
)


BIAS_COLUMNS = 8
"""Columns that a bias adds, all but the first of them zeros: kernels need the width in multiples of 16 bytes."""


def append_bias(hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states `[M, H + 8]` and a weight `[V, H + 8]` whose product is hidden @ weight.T + bias.

    So every loss kernel takes a bias. The price is a copy of the weight, and one of its gradient.
    """
    ones_M1 = hidden_MH.new_ones(len(hidden_MH), 1)
    hidden = torch.cat((hidden_MH, F.pad(ones_M1, (0, BIAS_COLUMNS - 1))), dim=1)
    columns_V8 = F.pad(bias_V[:, None].to(weight_VH.dtype), (0, BIAS_COLUMNS - 1))
    return hidden, torch.cat((weight_VH, columns_V8), dim=1)
