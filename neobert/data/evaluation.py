"""Evaluation documents: chosen once in source order, packed once, masked by (seed, document, token).

Nothing of it depends on the number of ranks, lanes or threads: rank r of R takes rows r, r + R, ... of one plan, and
every rank makes the same number of batches, the last ones padded with empty rows.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from neobert.config.schema import Config
from neobert.data.arrow import ArrowTexts, TokenStore
from neobert.data.collate import Collator, build_row
from neobert.data.encode import encode_documents
from neobert.data.errors import DataError
from neobert.data.lanes import LaneSettings, State, Window
from neobert.data.opening import Opened, Opener
from neobert.data.order import key
from neobert.data.packing import (
    SPECIALS_PER_SEGMENT,
    piece_lengths,
    split_documents,
)
from neobert.data.splits import check_split, choose_eval_split
from neobert.data.text import Encode, RecordCounts, TextSource
from neobert.types import PackedBatch

_SCAN = 65536


class EvalDocuments(NamedTuple):
    """Usable documents in source order, numbered from 0."""

    lengths: NDArray[np.int64]
    get: Callable[[int], NDArray[Any]]
    """Tokens of the document with this number, without special tokens."""

    rest: State | int | None
    """Where the source goes on after them: a cursor of text, or the number of the next indexed document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """How many documents to take."""

    documents: int | None = None
    slots: int | None = None
    """Stop when the documents fill this many slots of rows."""


def collect_texts(source: TextSource, encode: Encode, settings: LaneSettings, limit: Limit) -> EvalDocuments:
    """The first usable documents of a text source, tokenised and kept in memory."""
    counts = RecordCounts(max_bad=settings.max_bad_records, where="the evaluation documents")
    tokens: list[NDArray[Any]] = []
    num_slots, rest = 0, None
    for document in encode_documents(source.records(), encode, counts, settings.max_document_chars):
        slots = int(_slots(np.array([len(document.tokens)]), settings)[0])
        if not slots:
            continue
        tokens.append(document.tokens)
        num_slots, rest = num_slots + slots, document.cursor
        if len(tokens) == limit.documents or (limit.slots is not None and num_slots >= limit.slots):
            break
    return EvalDocuments(np.array([len(t) for t in tokens], dtype=np.int64), tokens.__getitem__, rest)


def collect_indexed(store: TokenStore, settings: LaneSettings, limit: Limit) -> EvalDocuments:
    """The first usable documents of an indexed store; their tokens stay on disk."""
    numbers, lengths = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    num_slots = 0
    for begin in range(0, len(store), _SCAN):
        documents = np.arange(begin, min(len(store), begin + _SCAN))
        sizes = store.lengths(documents)
        slots = _slots(sizes, settings)
        usable = np.flatnonzero(slots)
        if limit.slots is not None:
            usable = usable[num_slots + np.cumsum(slots[usable]) - slots[usable] < limit.slots]
        if limit.documents is not None:
            usable = usable[: limit.documents - len(numbers)]
        numbers, lengths = np.append(numbers, documents[usable]), np.append(lengths, sizes[usable])
        num_slots += int(slots[usable].sum())
        if len(numbers) == limit.documents or (limit.slots is not None and num_slots >= limit.slots):
            break
    rest = int(numbers[-1]) + 1 if len(numbers) else 0
    return EvalDocuments(lengths, lambda number: store.content(int(numbers[number])), rest)


def _slots(lengths: NDArray[np.int64], settings: LaneSettings) -> NDArray[np.int64]:
    """Slots that each document takes: of its segments, or of whole rows where every segment has its own; 0 when it is
    not usable."""
    documents, _, sizes, _ = piece_lengths(
        lengths, settings.max_seq_length, settings.min_length, truncate=settings.truncate
    )
    if settings.packing == "one_per_row":
        sizes = np.full_like(sizes, settings.max_seq_length)
    else:
        sizes = sizes + SPECIALS_PER_SEGMENT
    return np.bincount(documents, weights=sizes, minlength=len(lengths)).astype(np.int64)


class EvalSet:
    """The rows that every evaluation runs over."""

    def __init__(
        self, documents: EvalDocuments, settings: LaneSettings, *, seed: int, batch_rows: int, max_batches: int | None
    ) -> None:
        self._batch_rows = batch_rows
        self.num_documents = len(documents.lengths)
        pieces, _ = split_documents(
            documents.lengths, settings.max_seq_length, settings.min_length, truncate=settings.truncate
        )
        self.num_tokens = sum(piece.length + SPECIALS_PER_SEGMENT for piece in pieces)
        # Shuffled rows, so that a cap on the batches cuts long and short documents alike.
        rows = settings.plan(pieces, key(seed, "eval_rows"))
        self._rows = rows if max_batches is None else rows[: max_batches * batch_rows]
        self._window = Window(
            rows=self._rows,
            get=lambda piece: documents.get(piece.document)[piece.start : piece.start + piece.length],
            documents=np.arange(self.num_documents),
            next_state={},
        )

    def num_batches(self, world: int) -> int:
        """Batches that every rank makes."""
        return math.ceil(math.ceil(len(self._rows) / world) / self._batch_rows)

    def batches(self, collate: Collator, *, cls_id: int, sep_id: int, rank: int, world: int) -> Iterator[PackedBatch]:
        """This rank's batches of `batch_rows` rows."""
        mine = range(rank, len(self._rows), world)
        for number in range(self.num_batches(world)):
            chosen = mine[number * self._batch_rows : (number + 1) * self._batch_rows]
            rows = [build_row(self._rows[row], self._window, row, cls_id=cls_id, sep_id=sep_id) for row in chosen]
            yield collate(rows, num_rows=self._batch_rows)


class Evaluation(NamedTuple):
    """What is evaluated, and what of the training split is set apart for it."""

    eval_set: EvalSet | None
    held_out: State | int | None
    """Where the held-out documents end in the training split; None when none are held out."""

    notes: list[str]


def choose_evaluation(
    config: Config, opener: Opener, train_split: str, train: Opened, settings: LaneSettings
) -> Evaluation:
    """The named split, else a split that is called like one, else the first `dataset.eval_samples` training documents.

    Raises:
        DataError: the split is not there, a streamed one has no budget, or all documents would be held out.
    """
    section, max_batches = config.dataset, config.trainer.eval_max_batches
    names = list(opener.splits)
    if section.eval_split is not None:
        check_split(names, section.eval_split, "dataset.eval_split")
        if section.eval_split == train_split:
            raise DataError(
                f"dataset.eval_split: {section.eval_split!r} is the training split; set dataset.eval_split: null and "
                "dataset.eval_samples to hold out its first documents"
            )
    name = section.eval_split or choose_eval_split(names, train_split)
    if name is None and not section.eval_samples:
        return Evaluation(None, None, ["no evaluation: no validation split, and dataset.eval_samples is not set"])
    opened = train if name is None else opener.open(name)
    settings = replace(settings, packing="best_fit" if config.datacollator.pack_sequences else "one_per_row")
    limit = _choose_limit(config, opened)
    documents = _collect(opened, opener.tokenizer.encode_batch, settings, limit)
    found = len(documents.lengths)
    if name is None:
        store_size = len(opened.documents) if isinstance(opened.documents, TokenStore) else None
        if found < (section.eval_samples or 0) or documents.rest == store_size:
            raise DataError(
                f"dataset.eval_samples: {section.eval_samples} holds out every usable document of {train_split!r} "
                f"({found}); lower it"
            )
    if not found:
        return Evaluation(None, None, [f"no evaluation: split {name!r} has no usable documents"])
    eval_set = EvalSet(
        documents,
        settings,
        seed=config.trainer.eval_seed,
        batch_rows=config.trainer.per_device_eval_batch_size,
        max_batches=max_batches,
    )
    if name is None:
        return Evaluation(
            eval_set, documents.rest, [f"evaluating on the first {found} documents, held out of training"]
        )
    return Evaluation(eval_set, None, [f"evaluating on {found} documents of split {name!r}", *opened.notes])


def _choose_limit(config: Config, opened: Opened) -> Limit:
    samples, max_batches = config.dataset.eval_samples, config.trainer.eval_max_batches
    if samples:
        return Limit(documents=samples)
    if max_batches:
        rows = max_batches * config.trainer.per_device_eval_batch_size
        return Limit(slots=rows * config.dataset.max_seq_length)
    if isinstance(opened.documents, TokenStore | ArrowTexts):
        return Limit()
    raise DataError(
        "a streamed evaluation split needs a budget: set dataset.eval_samples (documents) or trainer.eval_max_batches, "
        "or dataset.streaming: false to evaluate on all of it"
    )


def _collect(opened: Opened, encode: Encode, settings: LaneSettings, limit: Limit) -> EvalDocuments:
    if isinstance(opened.documents, TokenStore):
        return collect_indexed(opened.documents, settings, limit)
    return collect_texts(opened.documents, encode, settings, limit)
