"""What a model that was fine-tuned on labels says of texts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neobert.objectives.base import Answers, TextModel
from neobert.objectives.classification import HeadInfo, LabelModule
from neobert.objectives.labelled_rows import EncodedRows, encode_rows, encode_words


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledText:
    """A text and what the model says of it."""

    text: str
    label: str | float | tuple[str, ...]
    """The most likely label; all that are more likely than not; or the number."""

    probabilities: dict[str, float]
    """Of the labels, the most likely first; empty for numbers."""

    top_k: int
    """Labels to show."""

    def describe(self) -> str:
        if not self.probabilities:
            return f"{self.text}\n  {self.label:.4f}"
        shown = list(self.probabilities.items())[: self.top_k]
        said = f"\n  {', '.join(self.label) or 'no label'}:" if isinstance(self.label, tuple) else "\n "
        return f"{self.text}{said} " + ", ".join(f"{name} {value:.1%}" for name, value in shown)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledWords:
    """The words of a text, separated by spaces, and their labels."""

    text: str
    words: tuple[str, ...]
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    """Of each word's label."""

    def describe(self) -> str:
        return f"{self.text}\n  " + " ".join(f"{word}/{label}" for word, label in zip(self.words, self.labels))


def label_texts(
    model: TextModel, texts: Sequence[str], *, top_k: int, joint: bool
) -> list[LabelledText] | list[LabelledWords]:
    """Labels of texts, cut as they were in training. The two texts of a pair are separated by a tab.

    Raises:
        ValueError: `joint`, a text that is no pair where pairs were learned, or weights without a head.
    """
    if joint:
        raise ValueError("--joint: fills masks from left to right, and this model says labels; leave it out")
    if top_k < 1:
        raise ValueError(f"top_k: {top_k}; write 1 or more")
    module = model.module
    if not isinstance(module, LabelModule):
        raise ValueError(
            "this model was fine-tuned on labels and comes without its head; give the run, or one of its checkpoints"
        )
    if module.head.kind == "tokens":
        return _label_words(model, module, texts)
    rows = [_split_pair(text, module.head) for text in texts]
    encoded = encode_rows(model.tokenizer, rows, module.head.max_length)
    logits = _score(model, module, encoded)
    return [_describe_logits(text, x, module.head, top_k) for text, x in zip(texts, logits)]


def _split_pair(text: str, head: HeadInfo) -> list[str]:
    parts = text.split("\t") if head.num_texts == 2 else [text]
    if len(parts) != head.num_texts:
        raise ValueError(
            f"text: {text[:80]!r} is one text, but the model was trained on pairs; write both with a tab between them"
        )
    return parts


def _score(model: TextModel, module: LabelModule, encoded: EncodedRows) -> list[Tensor]:
    """fp32 logits `[M, C]` of each row, on the host."""
    weight, tokenizer = module.head_weight, model.tokenizer
    documents = [np.array([tokenizer.cls_id, *x, tokenizer.sep_id], dtype=np.int32) for x in encoded.tokens]
    found = []
    for hidden, firsts in zip(model.token_states(documents), encoded.firsts):
        lengths = torch.tensor([len(hidden)], device=weight.device)
        index = torch.from_numpy(firsts[firsts >= 0] + 1).to(weight.device)
        with torch.no_grad():
            found.append(module.label_logits(hidden.to(weight.device), lengths, index).cpu())
    return found


def _describe_logits(text: str, logits: Tensor, head: HeadInfo, top_k: int) -> LabelledText:
    if head.kind == "regression":
        return LabelledText(text=text, label=float(logits[0, 0]), probabilities={}, top_k=top_k)
    several = head.kind == "multilabel"
    values = (logits[0].sigmoid() if several else logits[0].softmax(0)).tolist()
    ranked = sorted(zip(head.labels, values), key=lambda item: -item[1])
    chosen = tuple(name for name, value in ranked if value > 0.5)
    return LabelledText(text=text, label=chosen if several else ranked[0][0], probabilities=dict(ranked), top_k=top_k)


def _label_words(model: TextModel, module: LabelModule, texts: Sequence[str]) -> list[LabelledWords]:
    rows = [text.split() for text in texts]
    encoded = encode_words(model.tokenizer, rows, module.head.max_length)
    answers = []
    for text, words, firsts, logits in zip(texts, rows, encoded.firsts, _score(model, module, encoded)):
        values, numbers = logits.softmax(1).max(1)
        found = iter(zip(numbers.tolist(), values.tolist()))
        said = [next(found) if first >= 0 else (default_label(module.head.labels), 0.0) for first in firsts.tolist()]
        answers.append(
            LabelledWords(
                text=text,
                words=tuple(words),
                labels=tuple(module.head.labels[number] for number, _ in said),
                probabilities=tuple(value for _, value in said),
            )
        )
    return answers


def default_label(labels: Sequence[str]) -> int:
    """The label of a word that the model does not see, since the text is cut before it: `O` where there is one."""
    return labels.index("O") if "O" in labels else 0


def show_nothing(
    model: TextModel, documents: Iterable[NDArray[Any]], *, num_texts: int, top_k: int
) -> list[LabelledText]:
    """The evaluation of labels says more than a few of them."""
    return []


ANSWERS = Answers(answer=label_texts, show=show_nothing, example="a text")
