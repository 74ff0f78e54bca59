"""What a model of causal language modelling answers: how likely a text is, and which tokens come next.

The texts are packed side by side, `[CLS] text [SEP]` each; a token sees itself and those before it, so [SEP] changes
nothing of what is said of the text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from neobert.data.rows.lanes import IntArray
from neobert.inference.fill_mask import MASK_TEXT, Guess, check_lengths
from neobert.inference.packed import token_losses, vocabulary_logits
from neobert.objectives.base import Answers, TextModel
from neobert.objectives.mlm import perplexity

_BEGINNING_TOKENS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class ContinuedText:
    """A text and the tokens that may follow it."""

    text: str
    loss: float
    """Mean of -log p of its tokens in nats, each from those before it; 0 for a text without tokens."""

    num_tokens: int
    following: tuple[Guess, ...]
    """The most likely next tokens, most likely first."""

    actual: str | None = None
    """The token that follows, where it is known."""

    def describe(self) -> str:
        """The text, its loss, then the next tokens."""
        guesses = ", ".join(f"{g.token.strip()!r} {g.probability:.1%}" for g in self.following)
        lines = [self.text, f"{self.loss:.4f} nats per token, ppl {perplexity(self.loss):.2f}", f"next: {guesses}"]
        lines += [] if self.actual is None else [f"actual: {self.actual.strip()!r}"]
        return "\n  ".join(lines)


def continue_texts(model: TextModel, texts: Sequence[str], *, top_k: int, joint: bool) -> list[ContinuedText]:
    """The loss of each text and its most likely next tokens.

    Raises:
        ValueError: a text asks for a mask to be filled or is longer than the model, or `top_k` is outside the
            vocabulary.
    """
    fills = "is for models of masked language modelling; this one was trained with causal language modelling"
    if joint:
        raise ValueError(f"--joint: {fills}, which fills no masks; leave it out")
    if not 1 <= top_k <= model.tokenizer.size:
        raise ValueError(f"top_k: {top_k} is outside the vocabulary; write a number from 1 to {model.tokenizer.size}")
    for text in texts:
        if MASK_TEXT in text:
            raise ValueError(
                f"text: {text[:80]!r} has a mask to fill, which {fills}: it says which tokens come next; write the "
                f"text up to there, for example {NEXT_ANSWERS.example!r}"
            )
    specials = [[model.tokenizer.cls_id], [model.tokenizer.sep_id]]
    documents = [
        np.array([*specials[0], *ids, *specials[1]], dtype=np.int32) for ids in model.tokenizer.encode_batch(texts)
    ]
    check_lengths(documents, texts, model.module.encoder.config.max_position_embeddings)
    return _continue(model, texts, documents, top_k)


def show_next_tokens(
    model: TextModel, documents: Iterable[IntArray], *, num_texts: int, top_k: int
) -> list[ContinuedText]:
    """The starts of documents, with the token that follows."""
    tokenizer, longest = model.tokenizer, model.module.encoder.config.max_position_embeddings - 2
    starts, actual = [], []
    for document in documents:
        length = min(_BEGINNING_TOKENS, longest, len(document) - 1)
        if length < 1:
            continue
        starts.append(np.concatenate([[tokenizer.cls_id], document[:length], [tokenizer.sep_id]], dtype=np.int32))
        actual.append(tokenizer.decode_token(int(document[length])))
        if len(starts) == num_texts:
            break
    texts = [" ".join(tokenizer.decode(tokens[1:-1]).split()) for tokens in starts]
    return _continue(model, texts, starts, top_k, actual)


def _continue(
    model: TextModel,
    texts: Sequence[str],
    documents: Sequence[IntArray],
    top_k: int,
    actual: Sequence[str | None] | None = None,
) -> list[ContinuedText]:
    module, tokenizer = model.module, model.tokenizer
    device, found = module.head_weight.device, []
    for text, tokens, states, known in zip(
        texts, documents, model.token_states(documents), actual or [None] * len(texts)
    ):
        hidden = states.to(device)
        targets = torch.from_numpy(tokens[1:-1].astype(np.int64)).to(device)
        losses = token_losses(module, hidden[:-2], targets, tokenizer.size)
        best = vocabulary_logits(module, hidden[-2:-1], tokenizer.size).softmax(dim=-1)[0].topk(top_k)
        following = tuple(
            Guess(token=tokenizer.decode_token(token_id), token_id=token_id, probability=probability)
            for token_id, probability in zip(best.indices.tolist(), best.values.tolist())
        )
        loss = losses.mean().item() if len(losses) else 0.0
        found.append(ContinuedText(text=text, loss=loss, num_tokens=len(targets), following=following, actual=known))
    return found


NEXT_ANSWERS = Answers(answer=continue_texts, show=show_next_tokens, example="The capital of France is")
