"""What an objective is: the module that learns, its batch, its metrics, and what a trained model answers.

`Objective` is one entry of the table in `neobert.objectives.table`. Parts that need packages above this one are named
by `package.module:attribute` and loaded when they are first used; everything here needs torch and numpy alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from neobert.config.schema import Config
from neobert.kernels.linear_cross_entropy import LinearCrossEntropy
from neobert.model.encoder import Encoder
from neobert.model.init import initialise
from neobert.model.layers import PredictionHead
from neobert.model.ngpt import UnitMatrix, normalise_
from neobert.objectives.masking import MaskPolicy
from neobert.types import Corruption, PackedBatch


class ObjectiveModule(nn.Module):
    """An encoder with a vocabulary projection, and in subclasses what an objective adds. What trains has a `forward`
    that takes a batch and returns the summed loss, `LossSum`, so that hooks of DDP and FSDP see it.

    With `tie_word_embeddings` the projection is the embedding matrix itself and there is no `decoder`. `decoder_bias`
    `[V]` is there where the config asks for it, and so is `prediction_head`, which the hidden states go through before
    the projection. With `ngpt` the logits are multiplied by `logit_scale` `[V]` over its
    base, s_z of `neobert.model.ngpt`.
    """

    is_causal: ClassVar[bool] = False
    """Whether tokens of a text that it is asked about see only themselves and those before them."""

    teacher: "Teacher | None" = None
    """A frozen model whose outputs it learns from; no part of its weights."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        config = encoder.config
        self.decoder: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            initialise(self.decoder, config)
            normalise_(self.unit_matrices()[-1:])
        self.prediction_head: PredictionHead | None = None
        if config.prediction_head:
            self.prediction_head = PredictionHead(config)
            initialise(self.prediction_head.dense, config)
        self.decoder_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.decoder_bias else None
        self.logit_scale: nn.Parameter | None = None
        if config.ngpt:
            self.logit_scale = nn.Parameter(torch.full((config.vocab_size,), config.scale_base))
        self.check_tied()

    def learn_from_average(self, average: Callable[[], Mapping[str, Tensor]] | None) -> None:
        """Called once before training, with what gives the moving average of the weights by their names, where the run
        has one: for objectives that learn from it. Raises StartupError where one needs it."""

    def learn_from(self, teacher: "Teacher") -> None:
        """Makes what is needed to learn from `teacher`, with initial weights; called once, before training."""
        self.teacher = teacher

    def describe_head(self) -> Mapping[str, Any] | None:
        """What must be known of the weights of a head beside their shapes, JSON-ready: `head.json` of a checkpoint."""
        return None

    @property
    def head_weight(self) -> Tensor:
        """The vocabulary projection `[V, H]`."""
        return self.encoder.embedding.weight if self.decoder is None else self.decoder.weight

    def projection_parameters(self) -> list[nn.Parameter]:
        """What the logits need beside the encoder; empty where they need nothing."""
        parts = (self.decoder, self.prediction_head)
        weights = [weight for part in parts if part is not None for weight in part.parameters()]
        return [*weights, *(x for x in (self.decoder_bias, self.logit_scale) if x is not None)]

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
                f"projection {'is' if tied else 'is not'} the embedding matrix; build the module from the config of "
                "its weights"
            )

    def before_projection(self, hidden: Tensor) -> Tensor:
        """What the vocabulary projection reads, of hidden states `[..., H]`."""
        return hidden if self.prediction_head is None else self.prediction_head(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits `[..., V]` of hidden states `[..., H]`, for prediction."""
        hidden = self.before_projection(hidden)
        bias = None if self.decoder_bias is None else self.decoder_bias.to(hidden.dtype)
        logits = F.linear(hidden, self.head_weight, bias)
        return logits if self.logit_scale is None else logits * (self.logit_scale / self.encoder.config.scale_base)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Teacher:
    """A frozen model that another one learns from."""

    module: ObjectiveModule
    """In evaluation mode, on the device of the run."""

    digest: str
    """sha256 of architecture, weights and tokenizer."""

    num_tokens: int
    """Of the vocabulary, which is the student's; rows of a projection beyond them are padding."""

    dtype: torch.dtype
    """Of matrix products."""

    pooling: str
    """How it was trained to make a vector of a text, a key of POOLING."""

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """The last hidden states `[B * S, E]` for the rows of a student, without gradients."""
        with torch.no_grad(), self.autocast():
            return self.module.encoder(batch.input_ids, batch.positions, batch.segments)

    def autocast(self) -> torch.autocast:
        """Its precision, whatever that of the student is."""
        device_type = self.module.head_weight.device.type
        return torch.autocast(device_type, self.dtype, enabled=self.dtype != torch.float32)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        """Itself: a copy of a student learns from the same one."""
        return self


class EvalMetrics(Protocol):
    """The metrics of one evaluation."""

    @property
    def loss(self) -> float: ...

    @property
    def criterion(self) -> float:
        """What `trainer.save_best` compares, the lower the better: the loss, or a metric with its sign changed."""

    def as_line(self) -> dict[str, Any]:
        """Its fields in `log.jsonl`."""

    def as_values(self) -> dict[str, float]:
        """What trackers get, by names with a section in front, such as `eval/loss`."""

    def describe(self) -> str:
        """One line for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSums:
    """Sums over all evaluation documents and ranks."""

    loss_sum: float
    num_correct: float
    counts: tuple[float, ...]
    """Sums of `LossSum.counts`."""

    num_targets: int
    num_tokens: int
    num_documents: int


class Answer(Protocol):
    """What a model says about one text: a dataclass, so that it can be printed as JSON."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def describe(self) -> str:
        """A few lines for people."""


class TextModel(Protocol):
    """A trained model with its tokenizer, as `neobert.load` gives it."""

    @property
    def module(self) -> ObjectiveModule: ...

    @property
    def tokenizer(self) -> Any: ...

    def encode(self, texts: Sequence[str]) -> Any:
        """`.documents`: `[CLS] text [SEP]` as token ids; `.num_truncated`."""

    def token_states(self, documents: Sequence[NDArray[Any]]) -> list[Tensor]:
        """The last hidden states of such documents, fp32 `[tokens, H]` each, on the host."""


class AnswerTexts(Protocol):
    def __call__(self, model: Any, texts: Sequence[str], *, top_k: int, joint: bool) -> Sequence[Answer]: ...


class ShowDocuments(Protocol):
    def __call__(
        self, model: Any, documents: Iterable[NDArray[Any]], *, num_texts: int, top_k: int
    ) -> Sequence[Answer]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What a trained model can be asked."""

    answer: AnswerTexts
    """About texts of a user, who may also ask about none, to have the options checked. Raises ValueError for a text or
    an option that it cannot answer for."""

    show: ShowDocuments
    """About the starts of evaluation documents (token ids without special tokens), at the end of a run."""

    example: str
    """A text to try."""


class CardResult(NamedTuple):
    """One number of an evaluation for the front matter of a model card."""

    task: str
    """Task of the hub."""

    dataset: str | None
    """A set of pairs; None is the evaluation data of the run."""

    metric: str
    value: Any
    label: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What the model card of an exported model says of its objective."""

    summary: str
    library_name: str
    pipeline_tag: str
    tags: tuple[str, ...]
    recipe: Callable[[Config, Sequence[str]], list[str]]
    """Lines about the training, from the names of its sources."""

    evaluation: Callable[[Mapping[str, Any]], list[str]]
    """Lines about an evaluation, from its line of `log.jsonl`."""

    results: Callable[[Mapping[str, Any]], Iterator[CardResult]]
    """The same as numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorSettings:
    """How a model makes a vector of a text."""

    max_length: int
    """Longer texts are cut here, in tokens, [CLS] and [SEP] included."""

    pooling: str = "mean"
    prompts: tuple[tuple[str, str], ...] = ()
    """Names and texts of what may be put before a text."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Objective:
    """One thing that an encoder is trained for."""

    name: str
    """A value of `trainer.objective`, or a `task` that has one objective."""

    task: str
    command: str
    """What trains it: `neobert <command>`."""

    title: str
    """As text, for messages."""

    build_module: Callable[[Encoder, Config, LinearCrossEntropy], ObjectiveModule]
    """What trains, around an encoder. Raises StartupError for a config that does not fit the encoder."""

    build_trained: Callable[[Encoder, Mapping[str, Any] | None], ObjectiveModule]
    """What answers, for weights that are loaded, and what `ObjectiveModule.describe_head` said of them."""

    training_only: tuple[str, ...] = ()
    """Prefixes of the names of weights that only training has; they are neither exported nor initial weights."""

    predicts_tokens: bool
    """Whether a target is a token that the vocabulary projection predicts: then the loss has a perplexity, and a target
    costs a projection."""

    fills_masks: bool
    """Whether a trained model can be asked what a [MASK] hides."""

    is_causal: bool = False
    """Whether tokens see only those before them. The classes of exported models see both sides, so such a one is a
    start for others (`model.init_from`) and is not exported."""

    reads: Literal["documents", "pairs", "labels"]
    """What `dataset` names: documents that become packed rows, prepared sets of pairs, or rows with labels."""

    section: str | None = None
    """A section of the config that this objective alone reads."""

    corrupt: Callable[[MaskPolicy], Corruption] = lambda masks: masks
    """How documents become targets, from the mask policy of the config: of training, and of an evaluation."""

    num_counts: int = 0
    """Length of `LossSum.counts` in an evaluation."""

    build_metrics: Callable[[EvalSums], EvalMetrics] | None = None
    """From the sums of an evaluation over documents; None where the job evaluates something else."""

    target_losses: Callable[[ObjectiveModule, PackedBatch], Tensor] | None = None
    """The loss of each target of an evaluation batch, fp32 `[M]` in nats (0 in unused entries), for probes; None where
    the loss is not a sum over tokens of held-out documents."""

    describe_baseline: Callable[[Config, Callable[[], float]], str] | None = None
    """A line about what a model reaches that knows nothing. The function gives the entropy of single tokens, nats."""

    vectors: Callable[[Config], VectorSettings] | None = None
    """How it was trained to make vectors of texts; None where it was not."""

    job: str
    """The `Job` of the training loop, by `module:attribute`."""

    answers: str
    """The `Answers` of a trained model, by `module:attribute`."""

    card: Card
