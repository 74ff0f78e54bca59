"""Labels of texts and of words: a head on the encoder, rows with labels in, the summed loss out.

| objective | head | a target |
|---|---|---|
| `sequence_classification` | pooled hidden states -> `dense` -> GELU -> dropout -> `classifier` | a text |
| `token_classification` | dropout -> `classifier`, on the first token of each word | a word |

`finetune.kind` chooses the loss: cross entropy of one class, binary cross entropies of several labels (their mean over
the labels), or the square of the difference to a number. The layers are those of EuroBERT's classes in transformers.

Data, lanes and evaluation are in `neobert.finetune`.

Legend: T tokens side by side, N texts, M targets (texts, or words), C labels, H hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.kernels.linear_cross_entropy import LinearCrossEntropy
from neobert.model.encoder import Encoder
from neobert.model.init import initialise
from neobert.model.pooling import choose_pooling
from neobert.objectives.base import Card, CardResult, Objective, ObjectiveModule
from neobert.secrets import readable
from neobert.types import LossSum, PackedBatch

Kind = Literal["classification", "multilabel", "regression", "tokens"]
"""What a label is; see `finetune.kind`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadInfo:
    """What a head means: `head.json` of a checkpoint."""

    kind: Kind
    labels: tuple[str, ...]
    """By number; empty for regression."""

    pooling: str
    max_length: int
    """Longer texts were cut here in training, in tokens, [CLS] and [SEP] included."""

    num_texts: int = 1
    """2 for pairs."""

    @property
    def num_outputs(self) -> int:
        return len(self.labels) or 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `asdict`."""
        return cls(**{**values, "labels": tuple(values["labels"])})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelledBatch:
    """Some rows of one process in one step."""

    texts: PackedBatch
    """The texts side by side in one row; the two of a pair are one text."""

    lengths: Tensor
    """int64 `[N]`: tokens of each text."""

    index: Tensor
    """int64 `[M]`: slots of the first tokens of words; empty where texts have the labels."""

    targets: Tensor
    """int64 `[M]` for one class a target, fp32 `[M]` for numbers, fp32 `[M, C]` for several labels."""

    row_keys: Tensor
    """int64 `[N]`: global row numbers, on the host."""

    digest: int

    @property
    def num_targets(self) -> int:
        return len(self.targets)

    @property
    def num_rows(self) -> int:
        return len(self.row_keys)

    @property
    def source_tokens(self) -> tuple[int, ...]:
        return self.texts.source_tokens

    @property
    def num_slots(self) -> int:
        return self.texts.num_slots

    @property
    def num_tokens(self) -> int:
        return self.texts.num_tokens

    @property
    def num_documents(self) -> int:
        return self.texts.num_documents

    @property
    def attended_tokens(self) -> int:
        return self.texts.attended_tokens

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """A copy with its tensors on `device`; `row_keys` stays on the host."""
        return self._moved(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """A copy in page-locked host memory."""
        return self._moved(lambda x: x.pin_memory())

    def record_stream(self, stream: Any) -> None:
        """Keeps the memory of tensors on a GPU until what is queued in `stream` now has read it."""
        for x in (self.texts, self.lengths, self.index, self.targets):
            x.record_stream(stream)

    def _moved(self, move: Callable[[Any], Any]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("texts", "lengths", "index", "targets"):
            values[name] = move(values[name])
        return type(self)(**values)


def label_loss(kind: Kind, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """The summed loss of fp32 logits `[M, C]`, targets as of `LabelledBatch`; `weights` `[C]` are those of the
    classes."""
    if kind == "regression":
        return F.mse_loss(logits.squeeze(1), targets, reduction="sum")
    if kind == "multilabel":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / logits.shape[1]
    return F.cross_entropy(logits, targets, weight=weights, reduction="sum")


def label_values(kind: Kind, logits: Tensor) -> Tensor:
    """Probabilities of the labels of logits `[..., C]`; of regression the numbers themselves."""
    if kind == "regression":
        return logits
    return logits.sigmoid() if kind == "multilabel" else logits.softmax(-1)


class LabelModule(ObjectiveModule):
    """An encoder with a head. An untied vocabulary projection stays as it is. In evaluation `forward` returns the
    logits as well."""

    def __init__(
        self, encoder: Encoder, head: HeadInfo, *, dropout: float = 0.0, weights: Sequence[float] | None = None
    ) -> None:
        """`weights` are those of the classes in the loss of training."""
        super().__init__(encoder)
        for weight in self.projection_parameters():
            weight.requires_grad_(False)
        self.head = head
        self.dropout = nn.Dropout(dropout)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", None if weights is None else torch.tensor(weights), persistent=False)
        self._build_head(encoder.config.hidden_size, head.num_outputs)
        for layer in self.children():
            if isinstance(layer, nn.Linear) and layer is not self.decoder:
                initialise(layer, encoder.config)
                nn.init.zeros_(layer.bias)

    def _build_head(self, width: int, num_outputs: int) -> None:
        raise NotImplementedError

    def describe_head(self) -> Mapping[str, Any]:
        return asdict(self.head)

    def freeze_first(self, num_layers: int) -> None:
        """Has embeddings and first blocks stay as they are."""
        encoder = self.encoder
        blocks = set(encoder.layers.modules())
        embeddings = [part for part in encoder.modules() if isinstance(part, nn.Embedding) and part not in blocks]
        for part in (*embeddings, *encoder.layers[:num_layers]):
            part.requires_grad_(False)

    def forward(self, batch: LabelledBatch) -> LossSum:
        """The loss summed over the targets of the batch."""
        texts = batch.texts
        hidden = self.encoder(texts.input_ids, texts.positions, texts.segments)
        logits = self.label_logits(hidden[: texts.num_tokens].float(), batch.lengths, batch.index)
        with torch.autocast(logits.device.type, enabled=False):
            weights = self.class_weights if self.training else None
            loss_sum = label_loss(self.head.kind, logits, batch.targets, weights)
        return LossSum(loss_sum=loss_sum, outputs=None if self.training else logits)

    def label_logits(self, hidden_TH: Tensor, lengths_N: Tensor, index_M: Tensor) -> Tensor:
        """fp32 logits `[M, C]` of texts of these lengths side by side, for words at these slots."""
        raise NotImplementedError


class SequenceClassifier(LabelModule):
    """Labels of texts."""

    def _build_head(self, width: int, num_outputs: int) -> None:
        self.pool = choose_pooling(self.head.pooling)
        self.dense = nn.Linear(width, width)
        self.classifier = nn.Linear(width, num_outputs)

    def label_logits(self, hidden_TH: Tensor, lengths_N: Tensor, index_M: Tensor) -> Tensor:
        pooled_NH = self.pool(hidden_TH, lengths_N).to(self.dense.weight.dtype)
        logits: Tensor = self.classifier(self.dropout(F.gelu(self.dense(pooled_NH))))
        return logits.float()


class TokenClassifier(LabelModule):
    """Labels of words."""

    def _build_head(self, width: int, num_outputs: int) -> None:
        self.classifier = nn.Linear(width, num_outputs)

    def label_logits(self, hidden_TH: Tensor, lengths_N: Tensor, index_M: Tensor) -> Tensor:
        first_MH = hidden_TH.index_select(0, index_M).to(self.classifier.weight.dtype)
        logits: Tensor = self.classifier(self.dropout(first_MH))
        return logits.float()


def describe_head(config: Config) -> HeadInfo:
    """The head of a run whose config is bound."""
    section = config.finetune
    assert section.kind != "auto", "the config is bound"
    return HeadInfo(
        kind=section.kind,
        labels=section.labels,
        pooling=section.pooling,
        max_length=config.dataset.max_seq_length,
        num_texts=1 if section.pair_column is None else 2,
    )


def _build(module: type[LabelModule], encoder: Encoder, config: Config, kernel: LinearCrossEntropy) -> LabelModule:
    """The module of a run; nothing is projected onto the vocabulary, so no loss kernel is needed.

    Raises:
        StartupError: more layers are to be frozen than there are.
    """
    section, num_layers = config.finetune, len(encoder.layers)
    if section.num_frozen_layers > num_layers:
        raise StartupError(
            f"finetune.num_frozen_layers: {section.num_frozen_layers}, but the encoder has {num_layers} layers; lower "
            "it"
        )
    weights = None if section.class_weights is None else [float(x) for x in section.class_weights]
    built = module(encoder, describe_head(config), dropout=section.classifier_dropout, weights=weights)
    if section.initial_score is not None:
        nn.init.constant_(built.get_parameter("classifier.bias"), section.initial_score)
    if section.num_frozen_layers:
        built.freeze_first(section.num_frozen_layers)
    return built


# --- the card of an exported model ----------------------------------------------------------------------------------

_LEARNED = {
    "classification": "one label a text",
    "multilabel": "any number of labels a text",
    "regression": "a number a text",
    "tokens": "a label a word",
}


def _describe_recipe(config: Config, sources: Sequence[str]) -> list[str]:
    section, data = config.finetune, config.dataset
    named = ", ".join(sources) or readable(str(data.path or data.name))
    labels = (
        f": {', '.join(section.labels[:20])}{', ...' if len(section.labels) > 20 else ''}" if section.labels else ""
    )
    return [
        f"- fine-tuned on {named}",
        f"- {_LEARNED.get(section.kind, 'labels')}{labels}",
        f"- texts of at most {data.max_seq_length} tokens",
    ]


def _describe_evaluation(line: Mapping[str, Any]) -> list[str]:
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in line["metrics"].items())
    return [f"- evaluation at step {line['step']:,} on {line['num_rows']:,} texts: {metrics}"]


def _list_results(task: str, line: Mapping[str, Any]) -> Iterator[CardResult]:
    for metric, value in line["metrics"].items():
        yield CardResult(task, None, metric, value, None)


def _build_entry(name: str, module: type[LabelModule], weights: tuple[str, ...], tag: str, title: str) -> Objective:
    def build_trained(encoder: Encoder, head: Mapping[str, Any] | None) -> ObjectiveModule:
        assert head is not None, "checkpoints with such weights have it"
        return module(encoder, HeadInfo.from_dict(head))

    return Objective(
        name=name,
        task="finetune",
        command="finetune",
        title=title,
        build_module=partial(_build, module),
        build_trained=build_trained,
        training_only=weights,
        predicts_tokens=False,
        fills_masks=False,
        reads="labels",
        section="finetune",
        job="neobert.finetune.job:FINETUNE",
        answers="neobert.objectives.label_answers:ANSWERS",
        card=Card(
            summary=f"An encoder fine-tuned for {title}.",
            library_name="transformers",
            pipeline_tag=tag,
            tags=("encoder",),
            recipe=_describe_recipe,
            evaluation=_describe_evaluation,
            results=partial(_list_results, tag),
        ),
    )


SEQUENCE_CLASSIFICATION = _build_entry(
    "sequence_classification",
    SequenceClassifier,
    ("dense.", "classifier."),
    "text-classification",
    "the classification of texts",
)
TOKEN_CLASSIFICATION = _build_entry(
    "token_classification", TokenClassifier, ("classifier.",), "token-classification", "the classification of words"
)
