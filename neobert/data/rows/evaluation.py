"""Evaluation documents: chosen once in source order, packed once, masked by (seed, source, document, token).

Nothing of it depends on the number of ranks, lanes or threads: rank r of R takes rows r, r + R, ... of one plan, and
every rank makes the same number of batches, the last ones padded with empty rows.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from neobert.config.schema import Config
from neobert.data.rows.collate import Collator, build_row
from neobert.data.rows.lanes import RowOrder, Window
from neobert.data.rows.order import key
from neobert.data.rows.packing import SPECIALS_PER_SEGMENT, split_documents
from neobert.data.source.documents import FirstDocuments
from neobert.data.source.inventory import NO_FILES, Inventory
from neobert.data.source.splits import SplitSlice, check_disjoint, check_split, choose_eval_split, parse_split
from neobert.data.source.text import RecordCounts
from neobert.data.store.opening import Source, View
from neobert.errors import DataError
from neobert.types import PackedBatch


class EvalSet:
    """The rows that every evaluation runs over."""

    def __init__(
        self,
        sources: Sequence[FirstDocuments],
        order: RowOrder,
        *,
        seed: int,
        batch_rows: int,
        max_batches: int | None,
        fingerprint: str,
    ) -> None:
        """`fingerprint` changes when the documents do."""
        self._batch_rows, self._sources = batch_rows, sources
        lengths = np.concatenate([source.lengths for source in sources])
        numbers = np.concatenate([np.arange(len(source.lengths)) for source in sources])
        source_of = np.repeat(np.arange(len(sources)), [len(source.lengths) for source in sources])
        pieces, _ = split_documents(lengths, order.max_seq_length, order.min_length, truncate=order.truncate)
        self.num_tokens = sum(piece.length + SPECIALS_PER_SEGMENT for piece in pieces)
        num_documents = sum(source.num_documents for source in sources)
        plan = [len(lengths), num_documents, self.num_tokens, zlib.crc32(lengths.tobytes())]
        self.fingerprint = f"{fingerprint} {plan}"
        # Shuffled rows, so that a cap on the batches cuts long and short documents alike.
        rows = order.plan(pieces, key(seed, "eval_rows"))
        self._rows = rows if max_batches is None else rows[: max_batches * batch_rows]
        firsts = np.cumsum([0, *(source.num_documents for source in sources)])
        document_of = np.concatenate([source.document_of + first for source, first in zip(sources, firsts)])
        self.num_documents = len(np.unique(document_of[[piece.document for row in self._rows for piece in row]]))
        """Documents of which at least a piece is evaluated."""

        self._window = Window(
            rows=self._rows,
            get=lambda piece: sources[source_of[piece.document]].get(int(numbers[piece.document]))[
                piece.start : piece.start + piece.length
            ],
            documents=numbers,
            sources=source_of,
            next_state={},
        )

    def documents(self) -> Iterator[NDArray[Any]]:
        """Tokens of the documents in source order, without special tokens; stored pieces one by one."""
        for source in self._sources:
            yield from map(source.get, range(len(source.lengths)))

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

    def first_batches(
        self, collate: Collator, num_tokens: int, *, cls_id: int, sep_id: int, rank: int, world: int
    ) -> Iterator[PackedBatch]:
        """This rank's batches of the first rows of all ranks, as many as have `num_tokens` tokens together; of at most
        `batch_rows` rows, none of them all padding, so ranks may have none."""
        tokens = np.cumsum([sum(piece.length + SPECIALS_PER_SEGMENT for piece in row) for row in self._rows])
        count = min(len(tokens), int(np.searchsorted(tokens, num_tokens)) + 1)
        mine = range(rank, count, world)
        for first in range(0, len(mine), self._batch_rows):
            chosen = mine[first : first + self._batch_rows]
            yield collate(
                [build_row(self._rows[row], self._window, row, cls_id=cls_id, sep_id=sep_id) for row in chosen]
            )


class EvaluationChoice(NamedTuple):
    """What is evaluated, and what is trained on besides."""

    eval_set: EvalSet | None
    train: Sequence[View]
    """What is left to train on, of each source."""

    notes: list[str]
    inventory: Inventory = NO_FILES
    """Files of the evaluation splits."""


def choose_evaluation(
    config: Config, sources: Sequence[Source], train: Sequence[View], order: RowOrder
) -> EvaluationChoice:
    """The named split, else a split that is called like one, else the first documents of the training split.

    Raises:
        DataError: the split is not there, a streamed one has no budget, or all documents would be held out.
    """
    order = replace(order, packing="best_fit" if config.datacollator.pack_sequences else "none")
    chosen = _choose_splits(config, sources)
    rest, inventory = train, NO_FILES
    if any(split is not None for split in chosen):
        found, notes, views = _collect_splits(config, sources, chosen, order)
        inventory = sum((view.documents.inventory for view in views), NO_FILES)
    elif config.dataset.eval_samples or config.dataset.validation_split:
        found, views = _collect_held_out(config, sources, train, order), train
        rest = [view.beyond(documents.last) for view, documents in zip(train, found)]
        number = sum(documents.num_documents for documents in found)
        notes = [f"evaluating on the first {number} documents, held out of training"]
    else:
        note = "no evaluation: no validation split, and neither dataset.eval_samples nor validation_split is set"
        return EvaluationChoice(None, train, [note])
    if not any(documents.num_documents for documents in found):
        return EvaluationChoice(None, train, ["no evaluation: the evaluation split has no usable documents"], inventory)
    eval_set = EvalSet(
        found,
        order,
        seed=config.trainer.eval_seed,
        batch_rows=config.trainer.per_device_eval_batch_size,
        max_batches=config.trainer.eval_max_batches,
        fingerprint=" ".join(view.documents.fingerprint for view in views),
    )
    return EvaluationChoice(eval_set, rest, notes, inventory)


def _choose_splits(config: Config, sources: Sequence[Source]) -> list[SplitSlice | None]:
    """The evaluation split of each source; None for a source that has none."""
    text = config.dataset.eval_split
    if text is None:
        names = [choose_eval_split(list(source.splits), source.train_split.name) for source in sources]
        return [None if name is None else parse_split(name) for name in names]
    requested = parse_split(text)
    if not any(requested.name in source.splits for source in sources):
        check_split([name for source in sources for name in source.splits], requested.name, "dataset.eval_split")
    for source in sources:
        if requested.name == source.train_split.name and (requested.is_whole or source.train_split.is_whole):
            raise DataError(
                f"dataset.eval_split: {text!r} is the training split; set dataset.eval_split: null and "
                "dataset.eval_samples to hold out its first documents"
            )
        check_disjoint(source.train_split, requested, source.count_train_split)
    return [requested if requested.name in source.splits else None for source in sources]


def _collect_splits(
    config: Config, sources: Sequence[Source], chosen: Sequence[SplitSlice | None], order: RowOrder
) -> tuple[list[FirstDocuments], list[str], Sequence[View]]:
    pairs = [(source, split) for source, split in zip(sources, chosen) if split is not None]
    counts = _split_count(config.dataset.eval_samples, [source.spec.weight for source, _ in pairs])
    found, notes, views = [], [], []
    for (source, split), count in zip(pairs, counts):
        view = source.open(split)
        num_slots = _choose_num_slots(config, view, count, len(pairs))
        documents = _take_first(view, source, order, num_documents=count, num_slots=num_slots)
        found.append(documents)
        views.append(view)
        of = f" of {source.spec.label}" if len(sources) > 1 else ""
        notes += [
            f"evaluating on {documents.num_documents} documents of split {str(split)!r}{of}",
            *view.documents.notes,
        ]
    return found, notes, views


def _collect_held_out(
    config: Config, sources: Sequence[Source], train: Sequence[View], order: RowOrder
) -> list[FirstDocuments]:
    section, found = config.dataset, []
    counts = _split_count(section.eval_samples, [source.spec.weight for source in sources])
    for source, view, count in zip(sources, train, counts):
        field, value = "dataset.eval_samples", count
        if section.validation_split is not None:
            field, value = "dataset.validation_split", _part_of(view, source, section.validation_split)
        documents = _take_first(view, source, order, num_documents=value)
        if documents.num_documents < (value or 0) or view.beyond(documents.last).count() == 0:
            raise DataError(
                f"{field}: {section.eval_samples or section.validation_split} holds out every usable document of "
                f"{str(source.train_split)!r} ({documents.num_documents}); lower it"
            )
        found.append(documents)
    return found


def _part_of(view: View, source: Source, fraction: float) -> int:
    count = view.count()
    if count is None:
        raise DataError(
            f"dataset.validation_split: {fraction} needs the number of documents, and {source.spec.label} is a stream "
            "that does not know it; write dataset.eval_samples, or dataset.streaming: false to tokenise it once"
        )
    return max(1, round(count * fraction))


def _split_count(total: int | None, weights: Sequence[float | None]) -> list[int | None]:
    """`total` cut by weights (None: equally), the largest remainders rounded up.

    >>> _split_count(10, [2.0, 1.0])
    [7, 3]
    """
    if total is None:
        return [None] * len(weights)
    known = [1.0 if weight is None else weight for weight in weights]
    exact = [total * weight / sum(known) for weight in known]
    counts = [math.floor(count) for count in exact]
    by_remainder = sorted(range(len(exact)), key=lambda n: counts[n] - exact[n])
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return list(counts)


def _choose_num_slots(config: Config, view: View, num_documents: int | None, num_views: int) -> int | None:
    """Slots of rows to fill with documents, where no number of documents is set; None: take all."""
    max_batches = config.trainer.eval_max_batches
    if num_documents is not None:
        return None
    if max_batches:
        rows = max_batches * config.trainer.per_device_eval_batch_size
        return -(-rows * config.dataset.max_seq_length // num_views)
    if view.documents.is_indexed:
        return None
    raise DataError(
        "a streamed evaluation split needs a budget: set dataset.eval_samples (documents) or trainer.eval_max_batches, "
        "or dataset.streaming: false to evaluate on all of it"
    )


def _take_first(
    view: View, source: Source, order: RowOrder, *, num_documents: int | None, num_slots: int | None = None
) -> FirstDocuments:
    if num_documents == 0:
        nothing = np.empty(0, dtype=np.int64)
        return FirstDocuments(nothing, _no_document, nothing, None)
    counts = RecordCounts(max_bad=source.section.max_bad_records, where="the evaluation documents")
    encode = source.tokenizer.encode_batch
    return view.documents.first(view.span, order, encode, counts, num_documents, num_slots)


def _no_document(number: int) -> NDArray[Any]:
    raise IndexError(number)
