"""The training documents as lanes, and how many there are where that is known."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from neobert.config.schema import Config, DatasetSection
from neobert.data.rows.lanes import DocumentStream, Lane, OpenStreams, PackingLane, RowOrder, fit_num_lanes
from neobert.data.rows.order import key
from neobert.data.rows.packing import SPECIALS_PER_SEGMENT, piece_lengths
from neobert.data.rows.streams import IndexedStream, MixtureStream, TextStream
from neobert.data.source.text import Reader, Share
from neobert.data.store.arrow import ArrowTexts, TokenStore, choose_indexed_lanes
from neobert.data.store.opening import View
from neobert.data.tokenizer import Tokenizer

INDEXED_WINDOW = 1024
STREAM_WINDOW = 256
"""Documents of a window when neither `dataset.window_documents` nor `dataset.shuffle_buffer_size` says."""

MIN_WINDOW = 64
"""A neighbourhood is cut into lanes only while their windows have so many documents: smaller ones pack badly."""

MIXTURE_LANES = 16


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainPart:
    """One source of the training documents."""

    view: View
    label: str
    weight: float | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainData:
    """The training documents."""

    lane_opener: Callable[[], Callable[[int], Lane]]
    """Gives a function that opens lane v. Lanes keep files open, so every loader takes a function of its own."""

    order: RowOrder
    labels: tuple[str, ...]
    """Names of the sources, in the order of their numbers."""

    store: TokenStore | None
    """Where indexed tokens are, when they are the only source; None for text that is tokenised on the way."""

    num_documents: int | None
    num_tokens: int | None
    """Of one pass, [CLS] and [SEP] included; None when unknown, and where weights decide how often a source is read."""

    num_pieces: int | None
    notes: list[str]


def build_row_order(config: Config, views: Sequence[View]) -> RowOrder:
    """How documents become rows; indexed tokens afford larger windows than text. Lanes are counted in `build_train`."""
    section = config.dataset
    window = INDEXED_WINDOW if _all_indexed(views) else STREAM_WINDOW
    return RowOrder(
        seed=config.seed,
        max_seq_length=section.max_seq_length,
        window_documents=section.window_documents or window,
        min_length=section.min_length,
        truncate=config.tokenizer.truncation,
        shuffle=section.shuffle_buffer_size != 0,
        max_document_chars=section.max_document_chars,
        packing=_choose_packing(config),
    )


def _choose_packing(config: Config) -> Literal["best_fit", "next_fit", "none"]:
    if not config.datacollator.pack_sequences:
        return "none"
    return "best_fit" if config.trainer.enforce_full_packed_batches else "next_fit"


def build_train(
    parts: Sequence[TrainPart], tokenizer: Tokenizer, order: RowOrder, section: DatasetSection
) -> TrainData:
    """Lanes over the training documents of all sources."""
    sizes = [_count(part.view, order) for part in parts]
    wanted = _choose_num_lanes(parts, order, section)
    num_lanes = wanted
    if section.num_lanes is None:

        def probe(count: int) -> OpenStreams:
            return _stream_opener(parts, count, sizes, tokenizer, order, section, log=False)

        num_lanes = fit_num_lanes(wanted, probe, order, weighted=parts[0].weight is not None)
    order = replace(order, num_lanes=num_lanes)
    if section.shuffle_buffer_size:
        order = replace(order, window_documents=math.ceil(section.shuffle_buffer_size / num_lanes))
    weights = [part.weight for part in parts]
    labels = _unique_labels(parts)

    def lane_opener() -> Callable[[int], Lane]:
        open_streams = _stream_opener(parts, num_lanes, sizes, tokenizer, order, section)

        def open_lane(lane: int) -> Lane:
            streams = open_streams(lane)
            if len(streams) == 1:
                return PackingLane(streams[0], order, lane)
            given = None if weights[0] is None else [weight or 0.0 for weight in weights]
            mixture = MixtureStream(streams=streams, weights=given, labels=labels, seed=order.seed, lane=lane)
            return PackingLane(mixture, order, lane)

        return open_lane

    only = parts[0].view.documents
    known = [size for size in sizes if size is not None] if weights[0] is None else []
    complete = len(known) == len(parts)
    counts = [part.view.count() for part in parts]
    return TrainData(
        lane_opener=lane_opener,
        order=order,
        labels=labels,
        store=only if len(parts) == 1 and isinstance(only, TokenStore) else None,
        num_documents=sum(count for count in counts if count is not None) if None not in counts else None,
        num_tokens=sum(tokens for tokens, _ in known) if complete else None,
        num_pieces=sum(pieces for _, pieces in known) if complete else None,
        notes=[_note_lanes(num_lanes, wanted, order), *_note_sizes(parts, order, num_lanes, section)],
    )


def _stream_opener(
    parts: Sequence[TrainPart],
    num_lanes: int,
    sizes: Sequence[tuple[int, int] | None],
    tokenizer: Tokenizer,
    order: RowOrder,
    section: DatasetSection,
    *,
    log: bool = True,
) -> OpenStreams:
    """Gives a function that opens the streams of all sources in lane v."""
    openers = [
        _source_opener(part.view, number, len(parts), num_lanes, size, tokenizer, order, section, log)
        for number, (part, size) in enumerate(zip(parts, sizes))
    ]
    return lambda lane: [opener(lane) for opener in openers]


def _source_opener(
    view: View,
    number: int,
    num_sources: int,
    num_lanes: int,
    size: tuple[int, int] | None,
    tokenizer: Tokenizer,
    order: RowOrder,
    section: DatasetSection,
    log: bool,
) -> Callable[[int], DocumentStream]:
    # Every source of a mixture has a seed of its own, so that equal sources are not read in the same order.
    seed = order.seed if num_sources == 1 else key(order.seed, "mixture", number)
    if isinstance(view.documents, TokenStore):
        store, (first, last) = view.documents, view.rows
        num_tokens = size[0] if size is not None else 0
        return lambda lane: IndexedStream(
            store=store,
            order=order,
            lane=lane,
            num_lanes=num_lanes,
            first=first,
            last=last,
            num_tokens=num_tokens,
            source=number,
            seed=seed,
        )
    readers = _readers(view, order, num_lanes, exact=num_sources > 1, seed=seed)
    return lambda lane: TextStream(
        reader=readers[lane],
        encode=tokenizer.encode_batch,
        order=order,
        lane=lane,
        source=number,
        section=section,
        log=log,
    )


def _readers(view: View, order: RowOrder, num_lanes: int | None, *, exact: bool, seed: int = 0) -> list[Reader]:
    assert not isinstance(view.documents, TokenStore)
    share = Share(seed=seed, num_lanes=num_lanes, span=view.span, shuffle=order.shuffle, exact=exact)
    return view.documents.readers(share)


def _choose_num_lanes(parts: Sequence[TrainPart], order: RowOrder, section: DatasetSection) -> int:
    """Lanes as asked for; else as many as the sources offer, and few enough for a small neighbourhood."""
    if section.shuffle_buffer_size == 0:
        return 1
    wanted = section.num_lanes
    if wanted is None:
        views = [part.view for part in parts]
        natural = [_natural_lanes(view, order) for view in views]
        wanted = max(natural) if _all_indexed(views) or len(views) == 1 else min(MIXTURE_LANES, max(natural))
        if section.shuffle_buffer_size is not None:
            wanted = max(1, min(wanted, section.shuffle_buffer_size // MIN_WINDOW))
    return wanted


def _natural_lanes(view: View, order: RowOrder) -> int:
    if isinstance(view.documents, TokenStore):
        first, last = view.rows
        return choose_indexed_lanes(last - first, order.window_documents)
    return len(_readers(view, order, None, exact=False))


def _all_indexed(views: Sequence[View]) -> bool:
    return all(isinstance(view.documents, TokenStore) for view in views)


def _count(view: View, order: RowOrder) -> tuple[int, int] | None:
    """(tokens with special tokens, pieces) of one pass over indexed documents; None for text."""
    if not isinstance(view.documents, TokenStore):
        return None
    first, last = view.rows
    lengths = view.documents.all_lengths()[first:last]
    _, _, sizes, _ = piece_lengths(lengths, order.max_seq_length, order.min_length, truncate=order.truncate)
    return int(sizes.sum()) + SPECIALS_PER_SEGMENT * len(sizes), len(sizes)


def _unique_labels(parts: Sequence[TrainPart]) -> tuple[str, ...]:
    labels = [part.label for part in parts]
    return tuple(f"{x} ({n})" if labels.count(x) > 1 else x for n, x in enumerate(labels))


def _note_lanes(num_lanes: int, wanted: int, order: RowOrder) -> str:
    kept = "" if order.shuffle else ", in the order of the source"
    fewer = "" if num_lanes == wanted else f" (of {wanted} lanes some would find no document to train on)"
    return f"{num_lanes} lanes{fewer}, windows of {order.window_documents} documents{kept}"


def _note_sizes(parts: Sequence[TrainPart], order: RowOrder, num_lanes: int, section: DatasetSection) -> list[str]:
    notes = []
    if len(parts) > 1:
        if parts[0].weight is not None:
            total = sum(part.weight or 0.0 for part in parts)
            shares = ", ".join(f"{(part.weight or 0.0) / total:.1%} {part.label}" for part in parts)
            notes.append(f"documents are drawn {shares}")
        else:
            notes.append("each document of " + ", ".join(part.label for part in parts) + " once per epoch")
        return notes
    view = parts[0].view
    if isinstance(view.documents, TokenStore | ArrowTexts):
        return notes
    sizes = [reader.size for reader in _readers(view, order, num_lanes, exact=False)]
    if min(sizes) and max(sizes) > 1.1 * min(sizes):
        notes.append(
            f"the largest lane has {max(sizes) / min(sizes):.1f} times the data of the smallest, which therefore "
            "repeats earlier; files of equal size, or another dataset.num_lanes, even this out"
        )
    return notes
