"""The held-out loss in parts: by how frequent the token is, by its position, and by the class of its word.

The evaluation's documents and masks, but at most `trainer.probe_tokens` of their tokens: the first rows of its plan,
which are shuffled. What is counted to make the bands is in the held-out documents alone, so runs that hold out the same
documents with one tokenizer have the same bands, whatever they train on.

- `frequency`: the rank of the token among all tokens of the held-out documents.
- `position`: of the token in its document; of a document that was cut in pieces, in its piece, as the model sees it.
- `word_class`: `function` are the `FUNCTION_WORDS` most frequent words of letters, in most languages about the closed
  class; `content` are all other words with a letter, `number` those with a digit and no letter, `punctuation` the rest.

A word is what the tokenizer shows as one (`neobert.data.words`): in scripts without spaces that is a run of characters,
and nearly all are content.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neobert.data.pipeline import DataPipeline
from neobert.data.rows.evaluation import EvalSet
from neobert.data.tokenizer import Tokenizer
from neobert.data.words import build_word_edges
from neobert.errors import DataError
from neobert.objectives.base import ObjectiveModule
from neobert.types import IGNORE_INDEX, PackedBatch, WordEdges

RANKS = (100, 1_000, 10_000)
"""Where bands of frequency end."""

POSITIONS = (32, 128, 512, 2048)
"""Where bands of position end."""

FUNCTION_WORDS = 100

CLASSES = ("function", "content", "number", "punctuation")

Numbers = NDArray[np.int64]


class BandLoss(NamedTuple):
    """One part."""

    loss: float
    """Mean over its targets, in nats."""

    num_targets: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeldOutCounts:
    """What the held-out documents are made of."""

    ranks: Numbers
    """`[V]`: rank of each token by its count, from 0."""

    edges: WordEdges | None
    """None where the tokenizer does not show where words begin: then there are no word classes."""

    function_words: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossBands:
    """This rank's part of the documents, and the part of the loss to which each target belongs."""

    batches: tuple[PackedBatch, ...]
    bands: tuple[dict[str, Numbers], ...]
    """Of each batch: `[M]` number of the band of each target, by the name of the parts."""

    names: dict[str, tuple[str, ...]]
    """Names of the bands."""

    def sum(self, losses: Callable[[PackedBatch], Tensor]) -> NDArray[np.float64]:
        """Sums of the loss and number of targets `[2, bands]`, the bands of all parts side by side.

        Args:
            losses: fp32 `[M]`, of the targets of a batch.
        """
        widths = {name: len(labels) for name, labels in self.names.items()}
        sums = {name: np.zeros((2, width)) for name, width in widths.items()}
        for batch, bands in zip(self.batches, self.bands):
            used = (batch.targets != IGNORE_INDEX).numpy()
            values = losses(batch).double().cpu().numpy()[used]
            for name, band in bands.items():
                sums[name][0] += np.bincount(band[used], weights=values, minlength=widths[name])
                sums[name][1] += np.bincount(band[used], minlength=widths[name])
        return np.concatenate([sums[name] for name in self.names], axis=1)

    def name(self, sums: NDArray[np.float64]) -> dict[str, dict[str, BandLoss]]:
        """The parts by their names, those without targets left out; from the sums over all ranks."""
        found: dict[str, dict[str, BandLoss]] = {}
        columns = iter(sums.T.tolist())
        for name, labels in self.names.items():
            bands = {label: next(columns) for label in labels}
            found[name] = {label: BandLoss(loss / n, int(n)) for label, (loss, n) in bands.items() if n}
        return found


def build_loss_bands(data: DataPipeline, tokenizer: Tokenizer, num_tokens: int) -> LossBands | None:
    """The parts over about so many tokens of the evaluation; None without evaluation documents."""
    if data.eval_set is None:
        return None
    counts = count_held_out(data.eval_set, tokenizer)
    batches = tuple(data.first_eval_batches(num_tokens))
    names = {"frequency": _name_bands(RANKS, first=1), "position": _name_bands(POSITIONS, first=0)}
    if counts.edges is not None:
        names["word_class"] = CLASSES
    spelled: dict[bytes, int] = {}
    return LossBands(
        batches=batches, bands=tuple(_find_bands(batch, counts, tokenizer, spelled) for batch in batches), names=names
    )


def count_held_out(eval_set: EvalSet, tokenizer: Tokenizer) -> HeldOutCounts:
    """Reads the held-out documents once."""
    try:
        edges = build_word_edges(tokenizer)
    except DataError:
        edges = None
    counts, alone = np.zeros(tokenizer.size, dtype=np.int64), np.zeros(tokenizer.size, dtype=np.int64)
    for tokens in eval_set.documents():
        counts += np.bincount(tokens, minlength=tokenizer.size)
        if edges is not None:
            starts = _starts(tokens, edges)
            alone += np.bincount(tokens[starts & np.append(starts[1:], True)], minlength=tokenizer.size)
    order = np.lexsort((np.arange(len(counts)), -counts))
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return HeldOutCounts(ranks=ranks, edges=edges, function_words=_most_frequent_words(alone, tokenizer))


def _most_frequent_words(counts: Numbers, tokenizer: Tokenizer) -> frozenset[str]:
    """Of how often each token is a whole word. Nearly every word that is frequent is one token."""
    found: dict[str, int] = {}
    for token in np.flatnonzero(counts).tolist():
        word = tokenizer.decode_token(token).strip().lower()
        if word.isalpha():
            found[word] = found.get(word, 0) + int(counts[token])
    return frozenset(sorted(found, key=lambda word: (-found[word], word))[:FUNCTION_WORDS])


def _starts(tokens: NDArray[Any], edges: WordEdges) -> NDArray[np.bool_]:
    """Whether a word starts at each token."""
    joined = edges.continues[tokens[1:]] & edges.is_continued[tokens[:-1]]
    return np.append(np.ones(min(1, len(tokens)), dtype=bool), ~joined)


def _name_bands(ends: Sequence[int], *, first: int) -> tuple[str, ...]:
    """`1-100`, `101-1000`, ..., `10001-`."""
    starts = [first, *(end + first for end in ends)]
    return (*(f"{start}-{following - 1}" for start, following in pairwise(starts)), f"{starts[-1]}-")


def _find_bands(
    batch: PackedBatch, counts: HeldOutCounts, tokenizer: Tokenizer, spelled: dict[bytes, int]
) -> dict[str, Numbers]:
    # Where the targets are: with causal segments the slots before them predict.
    targets, slots = batch.targets.numpy(), batch.masked_index.numpy() + int(batch.segments.causal)
    used = targets != IGNORE_INDEX
    tokens = np.where(used, targets, 0)
    positions = batch.positions.flatten().numpy()[slots]
    bands = {
        "frequency": np.digitize(counts.ranks[tokens], RANKS),
        "position": np.digitize(positions, POSITIONS),
    }
    if counts.edges is not None:
        bands["word_class"] = np.zeros(len(targets), dtype=np.int64)
        bands["word_class"][used] = _find_classes(batch, slots[used], targets[used], counts, tokenizer, spelled)
    return bands


def _find_classes(
    batch: PackedBatch,
    slots: Numbers,
    targets: Numbers,
    counts: HeldOutCounts,
    tokenizer: Tokenizer,
    spelled: dict[bytes, int],
) -> Numbers:
    """Indices in `CLASSES` of the words in which the targets are. `spelled` remembers words, by their tokens."""
    assert counts.edges is not None
    originals = batch.input_ids.flatten().numpy().copy()
    originals[slots] = targets
    starts = _starts(originals, counts.edges)
    starts[batch.segments.cu_seqlens_cpu.numpy()[:-1] % len(originals)] = True
    firsts = np.append(np.flatnonzero(starts), len(originals))
    words = np.searchsorted(firsts, slots, side="right") - 1
    classes = np.empty(len(slots), dtype=np.int64)
    for number, word in enumerate(words.tolist()):
        ids = originals[firsts[word] : firsts[word + 1]]
        key = ids.tobytes()
        if key not in spelled:
            spelled[key] = classify_word(tokenizer.decode(ids).strip(), counts.function_words)
        classes[number] = spelled[key]
    return classes


def classify_word(word: str, function_words: frozenset[str]) -> int:
    """Index in `CLASSES`; see the head of this module."""
    if any(character.isalpha() for character in word):
        return 0 if word.lower() in function_words else 1
    return 2 if any(character.isnumeric() for character in word) else 3


def measure(
    bands: LossBands, module: ObjectiveModule, losses: Callable[[ObjectiveModule, PackedBatch], Tensor]
) -> NDArray[np.float64]:
    """`LossBands.sum` of a module, without gradients."""
    device = module.head_weight.device
    with torch.no_grad():
        return bands.sum(lambda batch: losses(module, batch.to(device)))
