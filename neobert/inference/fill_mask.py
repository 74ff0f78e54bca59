"""Fill the masks of texts: the likeliest tokens in each place, with probabilities over the whole vocabulary.

The texts are packed side by side, `[CLS] text [SEP]` each, and go through the model in one pass.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neobert.data.tokenizer import Tokenizer
from neobert.model.segments import Segments
from neobert.objectives.mlm import MaskedLM

MASK_TEXT = "[MASK]"
"""Stands for a mask in a text, whatever the tokenizer calls it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guess:
    """One token in the place of a mask."""

    token: str
    """Its text; a leading space belongs to the token."""

    token_id: int

    probability: float
    """Softmax over all tokens of the tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FilledText:
    """A text and what stands in its masks."""

    text: str
    masks: tuple[tuple[Guess, ...], ...]
    """The likeliest tokens of each mask, likeliest first; masks in the order of the text."""

    def describe(self) -> str:
        """The text, then a line for each mask."""
        lines = [", ".join(f"{g.token.strip()!r} {g.probability:.1%}" for g in guesses) for guesses in self.masks]
        return "\n  ".join([self.text, *lines])


def fill_mask(model: MaskedLM, tokenizer: Tokenizer, texts: Sequence[str], *, top_k: int = 5) -> list[FilledText]:
    """The `top_k` likeliest tokens for every mask of every text; a mask is `[MASK]` or the tokenizer's own word for it.

    Raises ValueError for a text without a mask, for a text that is longer than the model's positions, and for a `top_k`
    outside the vocabulary.
    """
    if not 1 <= top_k <= tokenizer.size:
        raise ValueError(f"top_k: {top_k} is outside the vocabulary; write a number from 1 to {tokenizer.size}")
    if not texts:
        return []
    encoded = [_encode(tokenizer, text) for text in texts]
    check_lengths(encoded, texts, model.encoder.config.max_position_embeddings)
    probabilities = _mask_probabilities(model, tokenizer, encoded)
    best = probabilities.topk(top_k, dim=-1)
    guesses = iter(
        tuple(
            Guess(token=tokenizer.decode_token(token_id), token_id=token_id, probability=probability)
            for token_id, probability in zip(ids, values)
        )
        for ids, values in zip(best.indices.tolist(), best.values.tolist())
    )
    counts = [int((tokens == tokenizer.mask_id).sum()) for tokens in encoded]
    return [FilledText(text=text, masks=tuple(next(guesses) for _ in range(n))) for text, n in zip(texts, counts)]


def check_lengths(encoded: Sequence[NDArray[np.int32]], texts: Sequence[str], longest: int) -> None:
    """Raise ValueError naming the texts of more than `longest` tokens, [CLS] and [SEP] included."""
    too_long = [f"{text[:40]!r}... has {len(ids)}" for ids, text in zip(encoded, texts) if len(ids) > longest]
    if too_long:
        raise ValueError(
            f"text: {'; '.join(too_long)} tokens, and the model takes {longest} (model.max_position_embeddings); "
            "shorten it"
        )


def _encode(tokenizer: Tokenizer, text: str) -> NDArray[np.int32]:
    """`[CLS] text [SEP]` with mask ids. Text that spells another special token stays text.

    The space before a mask goes with the mask: byte-level vocabularies write it as part of the hidden word.
    """
    words = {MASK_TEXT, *(word for word, i in tokenizer.special_tokens.items() if i == tokenizer.mask_id)}
    pieces = re.split(" ?(?:" + "|".join(re.escape(word) for word in sorted(words)) + ")", text)
    if len(pieces) == 1:
        raise ValueError(f"text: {text[:80]!r} has no mask; write {MASK_TEXT} in the place to fill")
    mask = np.array([tokenizer.mask_id], dtype=np.int32)
    first, *rest = tokenizer.encode_batch(pieces)
    inside = [first, *(part for piece in rest for part in (mask, piece))]
    return np.concatenate([[tokenizer.cls_id], *inside, [tokenizer.sep_id]], dtype=np.int32)


@torch.inference_mode()
def _mask_probabilities(model: MaskedLM, tokenizer: Tokenizer, encoded: Sequence[NDArray[np.int32]]) -> Tensor:
    """fp32 `[masks, tokenizer.size]` on the host. Rows of the weight beyond the tokenizer are padding and left out."""
    device = model.head_weight.device
    input_ids, positions, segments = _side_by_side(encoded)
    where = (input_ids[0] == tokenizer.mask_id).nonzero()[:, 0].to(device)
    was_training = model.training
    model.eval()
    try:
        with _precision(model):
            hidden = model.encoder(input_ids.to(device), positions.to(device), segments.to(device))
            logits = model.logits(hidden.index_select(0, where))
    finally:
        model.train(was_training)
    return logits[:, : tokenizer.size].float().softmax(dim=-1).cpu()


def _side_by_side(encoded: Sequence[NDArray[np.int32]]) -> tuple[Tensor, Tensor, Segments]:
    """Token ids `[1, T]`, positions `[1, T]` and segments of the texts in one row."""
    borders = torch.tensor([0, *accumulate(len(tokens) for tokens in encoded)], dtype=torch.int32)
    lengths = [end - start for start, end in pairwise(borders.tolist())]
    numbers = torch.repeat_interleave(torch.arange(1, len(lengths) + 1, dtype=torch.int32), torch.tensor(lengths))
    segments = Segments(ids=numbers[None], cu_seqlens=borders, cu_seqlens_cpu=borders, max_seqlen=max(lengths))
    positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])
    return torch.from_numpy(np.concatenate(encoded))[None], positions[None], segments


def _precision(model: MaskedLM) -> AbstractContextManager[object]:
    """The dtype of the weights, or bf16 where the model's attention cannot compute in that."""
    weight = model.head_weight
    if model.encoder.attention.obstacle(weight.device, weight.dtype) is None:
        return nullcontext()
    return torch.autocast(weight.device.type, torch.bfloat16)
