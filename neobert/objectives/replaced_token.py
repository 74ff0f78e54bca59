"""Replaced-token detection: which tokens of a text are not its own?

This is the discriminator of ELECTRA (Clark et al., arXiv 2003.10555, section 2) without its generator: the tokens that
masked language modelling would predict are replaced by random ones, drawn as 10% of those are there, and the model says
of every token whether it was replaced. The loss is a binary cross entropy over all tokens but the special ones, which
are never replaced. A replacement that happens to be the token itself counts as original, as in the paper.

The head, `discriminator`, is that of the paper: a layer as wide as the encoder, GELU, and one logit. Only training has
it. The vocabulary projection stays as it is: where it is the embedding matrix it learns as that.

Legend: T slots of the stream, M targets (static), H hidden size.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from neobert.config.schema import Config
from neobert.kernels.linear_cross_entropy import LinearCrossEntropy
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.init import initialise
from neobert.objectives.base import Answers, Card, CardResult, EvalSums, Objective, ObjectiveModule, TextModel
from neobert.objectives.masking import MaskPolicy
from neobert.objectives.mlm import UNITS_IN_WORDS, describe_rate, describe_rows
from neobert.types import IGNORE_INDEX, LossSum, PackedBatch


class Discriminator(nn.Module):
    """One logit a token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, 1)
        for layer in (self.dense, self.out):
            initialise(layer, config)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """fp32 logits `[...]` of hidden states `[..., H]`; positive where a token seems to be replaced."""
        logits: Tensor = self.out(F.gelu(self.dense(hidden)))
        return logits.squeeze(-1).float()


class ReplacedTokenDetector(ObjectiveModule):
    """Says of every token whether it was replaced; `forward` returns the summed loss."""

    def __init__(self, encoder: Encoder, *, count_correct: bool = False) -> None:
        """`count_correct` counts correct answers in training too; in evaluation mode they are always counted."""
        super().__init__(encoder)
        self.count_correct = count_correct
        for weight in self.projection_parameters():
            weight.requires_grad_(False)
        self.discriminator = Discriminator(encoder.config)

    def forward(self, batch: PackedBatch) -> LossSum:
        """Summed binary cross entropy of the batch's targets, in nats. In evaluation also `counts`: the targets that
        were replaced, those that are said to be, and those that are both."""
        logits_M, replaced_M, counted_M = self.judge(batch)
        loss_sum = F.binary_cross_entropy_with_logits(
            logits_M, replaced_M.float(), weight=counted_M.float(), reduction="sum"
        )
        if self.training and not self.count_correct:
            return LossSum(loss_sum=loss_sum)
        said_M = (logits_M > 0) & counted_M
        num_correct = (counted_M & (said_M == replaced_M)).sum()
        if self.training:
            return LossSum(loss_sum=loss_sum, num_correct=num_correct)
        counts = torch.stack([replaced_M.sum(), said_M.sum(), (replaced_M & said_M).sum()])
        return LossSum(loss_sum=loss_sum, num_correct=num_correct, counts=counts)

    def judge(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Of each target: its logit fp32, whether it was replaced, and whether it is one; `[M]` each."""
        hidden_TH = self.encoder(batch.input_ids, batch.positions, batch.segments)
        logits_M = self.discriminator(hidden_TH).index_select(0, batch.masked_index)
        counted_M = batch.targets != IGNORE_INDEX
        replaced_M = (batch.input_ids.flatten().index_select(0, batch.masked_index) != batch.targets) & counted_M
        return logits_M, replaced_M, counted_M


def target_losses(module: ObjectiveModule, batch: PackedBatch) -> Tensor:
    """Binary cross entropy of each target, fp32 `[M]`; 0 in unused entries."""
    assert isinstance(module, ReplacedTokenDetector), "the module of a run"
    logits_M, replaced_M, counted_M = module.judge(batch)
    return F.binary_cross_entropy_with_logits(logits_M, replaced_M.float(), weight=counted_M.float(), reduction="none")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Replacements:
    """Random tokens instead of those that `masks` chooses; every token that is no special one is a target."""

    masks: MaskPolicy
    is_causal = False

    def corrupt(
        self, tokens: NDArray[np.int32], hashes: NDArray[np.uint64], offset: float, *, step: int = 0
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Replace tokens of one row: `(corrupted i32[n], targets i64[k])`; see `MaskPolicy.corrupt`."""
        corrupted, _ = self.masks.corrupt(tokens, hashes, offset, step=step)
        return corrupted, self.masks.find_maskable(tokens)

    def max_targets(self, num_slots: int) -> int:
        return num_slots


def build_replacements(masks: MaskPolicy) -> Replacements:
    """Replacements at the rate and by the units of a mask policy."""
    return Replacements(masks=replace(masks, mask_all=False, mask_fraction=0.0, random_fraction=1.0))


def build_detector(encoder: Encoder, config: Config, kernel: LinearCrossEntropy) -> ReplacedTokenDetector:
    """The module of a run; nothing is projected onto the vocabulary, so no loss kernel is needed."""
    return ReplacedTokenDetector(encoder, count_correct=config.trainer.log_train_accuracy)


def describe_baseline(config: Config, unigram_entropy: Callable[[], float]) -> str:
    """The loss of a model that gives every token the same probability, the rate of replaced tokens at the start."""
    p = config.datacollator.mlm_probability
    entropy = -sum(x * math.log(x) for x in (p, 1 - p) if x > 0)
    return f"entropy   {entropy:.4f} nats: loss of a model that knows only that {p:.0%} of the tokens are replaced"


# --- evaluation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplacedTokenMetrics:
    """Metrics over every token of the evaluation documents that is no special one."""

    loss: float
    """Mean binary cross entropy in nats per token."""

    accuracy: float
    """Fraction of the tokens that are judged right. Calling every token original reaches 1 - `datacollator.
    eval_mlm_probability`, so look at precision and recall."""

    precision: float
    """Of the tokens that are said to be replaced, the fraction that was; 0 without any."""

    recall: float
    """Of the replaced tokens, the fraction that was found."""

    num_replaced: int
    num_targets: int
    num_tokens: int
    num_documents: int

    @property
    def criterion(self) -> float:
        return self.loss

    def as_line(self) -> dict[str, Any]:
        return asdict(self)

    def as_values(self) -> dict[str, float]:
        return {f"eval/{name}": getattr(self, name) for name in ("loss", "accuracy", "precision", "recall")}

    def describe(self) -> str:
        return (
            f"loss {self.loss:.4f} | accuracy {self.accuracy:.2%} | replaced tokens: precision {self.precision:.2%}, "
            f"recall {self.recall:.2%} | {self.num_replaced:,} replaced of {self.num_targets:,} tokens of "
            f"{self.num_documents:,} documents"
        )


def build_metrics(sums: EvalSums) -> ReplacedTokenMetrics:
    """Means over the tokens."""
    num_replaced, num_said, num_found = sums.counts
    return ReplacedTokenMetrics(
        loss=sums.loss_sum / max(sums.num_targets, 1),
        accuracy=sums.num_correct / max(sums.num_targets, 1),
        precision=num_found / max(num_said, 1),
        recall=num_found / max(num_replaced, 1),
        num_replaced=int(num_replaced),
        num_targets=sums.num_targets,
        num_tokens=sums.num_tokens,
        num_documents=sums.num_documents,
    )


# --- what a trained model answers -----------------------------------------------------------------------------------

SHOWN_TOKENS = 24
"""Tokens of the start of a document that is shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScore:
    """One token of a text."""

    token: str
    """Its text; a leading space belongs to the token."""

    token_id: int
    probability: float
    """That it was replaced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedText:
    """A text, and how likely each of its tokens was replaced."""

    text: str
    tokens: tuple[TokenScore, ...]
    """In the order of the text, without [CLS] and [SEP]."""

    top_k: int
    """Tokens to show."""

    replaced: str | None = None
    """The token that was put there, where it is known."""

    def describe(self) -> str:
        """The text, then its least likely tokens."""
        ranked = sorted(self.tokens, key=lambda x: -x.probability)[: self.top_k]
        lines = [self.text, "replaced? " + ", ".join(f"{x.token.strip()!r} {x.probability:.1%}" for x in ranked)]
        lines += [] if self.replaced is None else [f"replaced: {self.replaced.strip()!r}"]
        return "\n  ".join(lines)


def judge_texts(model: TextModel, texts: Sequence[str], *, top_k: int, joint: bool) -> list[JudgedText]:
    """How likely each token of each text was replaced, cut at the model's length.

    Raises:
        ValueError: a text asks for a mask to be filled, or the weights came without the head that judges.
    """
    fills = "is for models of masked language modelling; this one was trained with replaced-token detection"
    if joint:
        raise ValueError(f"--joint: {fills}, which fills no masks; leave it out")
    if top_k < 1:
        raise ValueError(f"top_k: {top_k}; write 1 or more")
    for text in texts:
        if "[MASK]" in text:
            raise ValueError(
                f"text: {text[:80]!r} has a mask to fill, which {fills}: it says which tokens of a text do not belong; "
                "write a text without [MASK], for example "
                f"{EXAMPLE!r}"
            )
    documents = model.encode(texts).documents
    return [_judge(model, text, tokens, scores, top_k) for text, tokens, scores in _score(model, texts, documents)]


def show_documents(
    model: TextModel, documents: Iterable[NDArray[Any]], *, num_texts: int, top_k: int
) -> list[JudgedText]:
    """The starts of documents, each with a random token in the middle."""
    tokenizer, length = model.tokenizer, min(SHOWN_TOKENS, model.module.encoder.config.max_position_embeddings - 2)
    shown: list[NDArray[np.int32]] = []
    replaced: list[str] = []
    for document in documents:
        if len(document) < 3:
            continue
        tokens = np.concatenate([[tokenizer.cls_id], document[:length], [tokenizer.sep_id]], dtype=np.int32)
        drawn = int(np.random.default_rng(len(shown)).choice(tokenizer.random_ids))
        tokens[len(tokens) // 2] = drawn
        shown.append(tokens)
        replaced.append(tokenizer.decode_token(drawn))
        if len(shown) == num_texts:
            break
    texts = [" ".join(tokenizer.decode(tokens[1:-1]).split()) for tokens in shown]
    return [
        replace(_judge(model, text, tokens, scores, top_k), replaced=token)
        for (text, tokens, scores), token in zip(_score(model, texts, shown), replaced)
    ]


def _score(
    model: TextModel, texts: Sequence[str], documents: Sequence[NDArray[Any]]
) -> Iterator[tuple[str, NDArray[Any], list[float]]]:
    module = model.module
    if not isinstance(module, ReplacedTokenDetector):
        raise ValueError(
            "this model was trained with replaced-token detection and comes without its head, which exported folders "
            "do not hold; give the run, or one of its checkpoints"
        )
    weight = module.discriminator.dense.weight
    for text, tokens, hidden in zip(texts, documents, model.token_states(documents)):
        with torch.no_grad():
            logits = module.discriminator(hidden.to(weight.device, weight.dtype))
        yield text, tokens, logits.sigmoid().tolist()


def _judge(model: TextModel, text: str, tokens: NDArray[Any], scores: Sequence[float], top_k: int) -> JudgedText:
    inside = list(zip(tokens.tolist(), scores))[1:-1]
    return JudgedText(
        text=text,
        tokens=tuple(
            TokenScore(token=model.tokenizer.decode_token(number), token_id=number, probability=score)
            for number, score in inside
        ),
        top_k=top_k,
    )


EXAMPLE = "The capital of France is seventeen."
ANSWERS = Answers(answer=judge_texts, show=show_documents, example=EXAMPLE)


# --- the card of an exported model ----------------------------------------------------------------------------------


def _describe_recipe(config: Config, sources: Sequence[str]) -> list[str]:
    masks = config.datacollator
    units = UNITS_IN_WORDS[masks.mask_units]
    drawn = (
        f"- {describe_rate(masks)} of the tokens replaced{units} by random ones; the head that finds them is left out"
    )
    return [*describe_rows(config, sources), drawn]


def _describe_evaluation(line: Mapping[str, Any]) -> list[str]:
    if line["loss"] is None:  # A number that was not finite.
        return []
    return [
        f"- held-out loss at step {line['step']:,}: {line['loss']:.4f} nats per token; replaced tokens found with "
        f"precision {line['precision']:.1%} and recall {line['recall']:.1%} ({line['num_replaced']:,} replaced tokens)"
    ]


def _list_results(line: Mapping[str, Any]) -> Iterator[CardResult]:
    for metric in ("precision", "recall"):
        yield CardResult("token-classification", None, metric, line[metric], f"{metric} of replaced tokens")


REPLACED_TOKEN = Objective(
    name="replaced_token",
    task="pretraining",
    command="pretrain",
    title="replaced-token detection",
    build_module=build_detector,
    build_trained=lambda encoder, head: ReplacedTokenDetector(encoder),
    training_only=("discriminator.",),
    predicts_tokens=False,
    fills_masks=False,
    reads="documents",
    corrupt=build_replacements,
    num_counts=3,
    build_metrics=build_metrics,
    target_losses=target_losses,
    describe_baseline=describe_baseline,
    job="neobert.train.pretraining:PRETRAINING",
    answers="neobert.objectives.replaced_token:ANSWERS",
    card=Card(
        summary="An encoder trained with replaced-token detection, the discriminator's task of ELECTRA.",
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=("encoder",),
        recipe=_describe_recipe,
        evaluation=_describe_evaluation,
        results=_list_results,
    ),
)
