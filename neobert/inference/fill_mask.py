"""Fill the masks of texts: the most likely tokens for each mask, with probabilities over the whole vocabulary.

The texts are packed side by side, `[CLS] text [SEP]` each. Several masks of one text are guessed independently of each
other, all from one pass, or jointly: from left to right, each guess made with the best ones before it filled in.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from neobert.data.rows.lanes import IntArray
from neobert.data.tokenizer import Tokenizer, check_mask_token
from neobert.inference.packed import BATCH_TOKENS, LOGITS_BYTES, hidden_states, plan_batches, vocabulary_logits
from neobert.objectives.base import Answers, ObjectiveModule, TextModel

MASK_TEXT = "[MASK]"
"""Marks a mask in a text, whatever the tokenizer calls it."""

_BEGINNING_TOKENS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Guess:
    """One token for a mask."""

    token: str
    """Its text; a leading space belongs to the token."""

    token_id: int

    probability: float
    """Softmax over all tokens of the tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FilledText:
    """A text and what fills its masks."""

    text: str
    masks: tuple[tuple[Guess, ...], ...]
    """The most likely tokens of each mask, most likely first; masks in the order of the text."""

    completed: str | None = None
    """The text with the best guesses in place, where they were made jointly."""

    hidden: str | None = None
    """The token after the only mask, where it is known."""

    def describe(self) -> str:
        """The text, then a line for each mask, then the completed text or the hidden token where there is one."""
        lines = [", ".join(f"{g.token.strip()!r} {g.probability:.1%}" for g in guesses) for guesses in self.masks]
        lines += [] if self.completed is None else [f"= {self.completed}"]
        lines += [] if self.hidden is None else [f"hidden: {self.hidden.strip()!r}"]
        return "\n  ".join([self.text, *lines])


def fill_mask(
    model: ObjectiveModule, tokenizer: Tokenizer, texts: Sequence[str], *, top_k: int = 5, joint: bool = False
) -> list[FilledText]:
    """The `top_k` most likely tokens for every mask of every text; a mask is `[MASK]` or the tokenizer's own token.

    With `joint` the masks of a text are filled from left to right: the guesses for a mask are made with the most likely
    token in each mask before it.

    Raises ValueError for a text without a mask, for a text that is longer than the model's positions, and for a `top_k`
    outside the vocabulary, or a mask token that occurs in text.
    """
    check_mask_token(tokenizer)
    if not 1 <= top_k <= tokenizer.size:
        raise ValueError(f"top_k: {top_k} is outside the vocabulary; write a number from 1 to {tokenizer.size}")
    encoded = [_encode(tokenizer, text) for text in texts]
    check_lengths(encoded, texts, model.encoder.config.max_position_embeddings)
    if not joint:
        return [FilledText(text=t, masks=m) for t, m in zip(texts, _guess_all(model, tokenizer, encoded, top_k))]
    positions = [np.flatnonzero(tokens == tokenizer.mask_id) for tokens in encoded]
    found: list[list[tuple[Guess, ...]]] = [[] for _ in texts]
    for turn in range(max(map(len, positions), default=0)):
        waiting = [item for item in range(len(texts)) if turn < len(positions[item])]
        guessed = _guess_all(model, tokenizer, [encoded[item] for item in waiting], top_k)
        for item, masks in zip(waiting, guessed):
            tokens, position = encoded[item], positions[item][turn]
            # Not simply the first: the best guess for a mask may be the mask token.
            guesses = masks[int((tokens[:position] == tokenizer.mask_id).sum())]
            found[item].append(guesses)
            tokens[position] = guesses[0].token_id
    return [
        FilledText(text=text, masks=tuple(masks), completed=tokenizer.decode(tokens[1:-1]).strip())
        for text, masks, tokens in zip(texts, found, encoded)
    ]


def fill_beginnings(
    model: ObjectiveModule, tokenizer: Tokenizer, documents: Iterable[IntArray], *, num_texts: int, top_k: int
) -> list[FilledText]:
    """Guesses for a hidden token near the middle of the first tokens of documents.

    Args:
        documents: Token ids without special tokens; those that are too short are skipped.
        num_texts: Stop after so many documents.
    """
    beginnings, hidden = [], []
    num_tokens = min(_BEGINNING_TOKENS, model.encoder.config.max_position_embeddings - 2)
    for document in documents:
        tokens = np.concatenate([[tokenizer.cls_id], document[:num_tokens], [tokenizer.sep_id]], dtype=np.int32)
        # Nearest to the middle, punctuation and spaces aside; as many tokens before it as after it hint at it.
        positions = [n for n in range(1, len(tokens) - 1) if re.search(r"\w", tokenizer.decode_token(int(tokens[n])))]
        if len(positions) < 3:
            continue
        position = min(positions, key=lambda n: abs(n - len(tokens) // 2))
        hidden.append(tokenizer.decode_token(int(tokens[position])))
        tokens[position] = tokenizer.mask_id
        beginnings.append(tokens)
        if len(beginnings) == num_texts:
            break
    masks = _guess_all(model, tokenizer, beginnings, top_k)
    texts = [_show_masked(tokenizer, tokens[1:-1], token) for tokens, token in zip(beginnings, hidden)]
    return [FilledText(text=t, masks=m, hidden=h) for t, m, h in zip(texts, masks, hidden)]


def _show_masked(tokenizer: Tokenizer, tokens: IntArray, hidden: str) -> str:
    """The text with the mask as `fill_mask` reads it back: after the space that is hidden with the token."""
    text, mask = tokenizer.decode(tokens), tokenizer.decode_token(tokenizer.mask_id)
    return " ".join(text.replace(mask, f" {mask}" if hidden[:1].isspace() else mask).split())


def check_lengths(encoded: Sequence[IntArray], texts: Sequence[str], longest: int) -> None:
    """Raise ValueError naming the texts of more than `longest` tokens, [CLS] and [SEP] included."""
    too_long = [f"{text[:40]!r}... has {len(ids)}" for ids, text in zip(encoded, texts) if len(ids) > longest]
    if too_long:
        raise ValueError(
            f"text: {'; '.join(too_long)} tokens, and the model takes {longest} (model.max_position_embeddings); "
            "shorten it"
        )


def _encode(tokenizer: Tokenizer, text: str) -> IntArray:
    """`[CLS] text [SEP]` with mask ids. Text that spells another special token stays text.

    The space before a mask goes with the mask: byte-level vocabularies write it as part of the hidden word.
    """
    masks = {MASK_TEXT, *(token for token, i in tokenizer.special_tokens.items() if i == tokenizer.mask_id)}
    pieces = re.split(" ?(?:" + "|".join(re.escape(mask) for mask in sorted(masks)) + ")", text)
    if len(pieces) == 1:
        raise ValueError(f"text: {text[:80]!r} has no mask; write {MASK_TEXT} where a token is to be filled in")
    mask = np.array([tokenizer.mask_id], dtype=np.int32)
    first, *rest = tokenizer.encode_batch(pieces)
    inside = [first, *(part for piece in rest for part in (mask, piece))]
    return np.concatenate([[tokenizer.cls_id], *inside, [tokenizer.sep_id]], dtype=np.int32)


def _guess_all(
    model: ObjectiveModule, tokenizer: Tokenizer, encoded: Sequence[IntArray], top_k: int
) -> list[tuple[tuple[Guess, ...], ...]]:
    """The guesses for the masks of each text."""
    found: dict[int, tuple[tuple[Guess, ...], ...]] = {}
    for batch in plan_batches([len(tokens) for tokens in encoded], BATCH_TOKENS):
        chosen = [encoded[item] for item in batch]
        guesses = iter(_guess(model, tokenizer, chosen, top_k))
        counts = [int((tokens == tokenizer.mask_id).sum()) for tokens in chosen]
        found |= {item: tuple(next(guesses) for _ in range(count)) for item, count in zip(batch, counts)}
    return [found[item] for item in range(len(encoded))]


def _guess(
    model: ObjectiveModule, tokenizer: Tokenizer, encoded: Sequence[IntArray], top_k: int
) -> list[tuple[Guess, ...]]:
    """The guesses for all masks of texts that go through the model together."""
    hidden = hidden_states(model, encoded)
    where = torch.from_numpy(np.flatnonzero(np.concatenate(encoded) == tokenizer.mask_id)).to(hidden.device)
    found: list[tuple[Guess, ...]] = []
    for part in where.split(max(1, LOGITS_BYTES // (4 * tokenizer.size))):
        logits = vocabulary_logits(model, hidden.index_select(0, part), tokenizer.size)
        best = logits.softmax(dim=-1).topk(top_k, dim=-1)
        found += [
            tuple(
                Guess(token=tokenizer.decode_token(token_id), token_id=token_id, probability=probability)
                for token_id, probability in zip(ids, values)
            )
            for ids, values in zip(best.indices.tolist(), best.values.tolist())
        ]
    return found


def answer_masks(model: TextModel, texts: Sequence[str], *, top_k: int, joint: bool) -> list[FilledText]:
    """`fill_mask` of a model with its tokenizer."""
    return fill_mask(model.module, model.tokenizer, texts, top_k=top_k, joint=joint)


def show_beginnings(model: TextModel, documents: Iterable[IntArray], *, num_texts: int, top_k: int) -> list[FilledText]:
    """`fill_beginnings` of a model with its tokenizer."""
    return fill_beginnings(model.module, model.tokenizer, documents, num_texts=num_texts, top_k=top_k)


MASK_ANSWERS = Answers(answer=answer_masks, show=show_beginnings, example="The capital of France is [MASK].")
