"""Causal language modelling: the loss of guessing the next token of a document from those before it.

Attention is causal within documents, and every token that is no special one is predicted by the slot before it, so that
the loss is a mean over the tokens that masks would be drawn from. Every slot learns something, which makes it a strong
start for an encoder: a first phase of it, then masked language modelling on both sides ("Should We Still Pretrain
Encoders with Masked Language Modeling?", Gisserot-Boukhlef et al., arXiv 2507.00994). The two phases are two runs, of
which the second has `model.init_from`, or one with `datacollator.clm_steps`.

The module is that of masked language modelling with the same weights: the batch says how tokens see each other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neobert.config.schema import Config
from neobert.kernels.linear_cross_entropy import KERNELS, LinearCrossEntropy
from neobert.model.encoder import Encoder
from neobert.objectives.base import CardResult, EvalSums
from neobert.objectives.masking import MaskPolicy
from neobert.objectives.mlm import MLM, MaskedLM, MaskedMetrics, describe_rows, loss_options, perplexity
from neobert.objectives.mlm import build_metrics as build_masked_metrics


class CausalLM(MaskedLM):
    """Predicts the next token; asked about texts, its tokens see themselves and those before them."""

    is_causal = True


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NextTokens:
    """Every token that `masks` could hide is a target of the slot before it; nothing is hidden."""

    masks: MaskPolicy
    is_causal = True

    def corrupt(
        self, tokens: NDArray[np.int32], hashes: NDArray[np.uint64], offset: float, *, step: int = 0
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The tokens as they are, and the slots that predict: a document begins with [CLS], which is no target."""
        return tokens, self.masks.find_maskable(tokens) - 1

    def max_targets(self, num_slots: int) -> int:
        return num_slots


def build_next_tokens(masks: MaskPolicy) -> NextTokens:
    """Next tokens, whatever the rate and units of a mask policy."""
    return NextTokens(masks=masks)


def build_causal_lm(encoder: Encoder, config: Config, kernel: LinearCrossEntropy) -> CausalLM:
    """The module of a run."""
    return CausalLM(encoder, kernel=kernel, **loss_options(config))


class NextTokenMetrics(MaskedMetrics):
    """Metrics over every token of the evaluation documents that is no special one: `loss` in nats per next token."""

    def describe(self) -> str:
        return (
            f"loss {self.loss:.4f} | ppl {perplexity(self.loss):.2f} | accuracy {self.accuracy:.2%} | "
            f"{self.num_targets:,} next tokens of {self.num_documents:,} documents"
        )


def build_metrics(sums: EvalSums) -> NextTokenMetrics:
    """Means over the next tokens."""
    return NextTokenMetrics(**asdict(build_masked_metrics(sums)))


# --- the card of an exported model ----------------------------------------------------------------------------------


def _describe_recipe(config: Config, sources: Sequence[str]) -> list[str]:
    return [*describe_rows(config, sources), "- every token predicted from those before it in its document"]


def _describe_evaluation(line: Mapping[str, Any]) -> list[str]:
    if line["loss"] is None:  # A number that was not finite.
        return []
    return [f"- held-out loss at step {line['step']:,}: {line['loss']:.4f} nats per next token"]


def _list_results(line: Mapping[str, Any]) -> Iterator[CardResult]:
    if line["loss"] is not None:
        yield CardResult("text-generation", None, "loss", line["loss"], "nats per next token")


CLM = replace(
    MLM,
    name="clm",
    title="causal language modelling",
    build_module=build_causal_lm,
    build_trained=lambda encoder, head: CausalLM(encoder, kernel=KERNELS["torch"]),
    fills_masks=False,
    is_causal=True,
    corrupt=build_next_tokens,
    build_metrics=build_metrics,
    answers="neobert.inference.next_tokens:NEXT_ANSWERS",
    card=replace(
        MLM.card,
        summary="An encoder trained with causal language modelling.",
        pipeline_tag="feature-extraction",
        tags=("encoder",),
        recipe=_describe_recipe,
        evaluation=_describe_evaluation,
        results=_list_results,
    ),
)
