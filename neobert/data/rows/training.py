"""The training documents as lanes, and how many there are where that is known."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from neobert.config.schema import Config, DatasetSection
from neobert.data.rows.lanes import Lane, OpenStreams, PackingLane, RowOrder, fit_num_lanes
from neobert.data.rows.order import key
from neobert.data.rows.streams import MixtureStream
from neobert.data.source.documents import Documents, StreamSettings
from neobert.data.source.one_reader import Share, alone
from neobert.data.source.text import STREAM_LANES, Sharding
from neobert.data.store.opening import View
from neobert.data.tokenizer import Tokenizer
from neobert.errors import DataError
from neobert.secrets import hide_credentials

INDEXED_WINDOW = 1024
STREAM_WINDOW = 256
"""Documents of a window when neither `dataset.window_documents` nor `dataset.shuffle_buffer_size` says."""

MIN_WINDOW = 64
"""A neighbourhood is cut into lanes only while their windows have so many documents: smaller ones pack badly."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainData:
    """The training documents."""

    lane_opener: Callable[[], Callable[[int], Lane]]
    """Gives a function that opens lane v. Lanes keep files open, so every loader takes a function of its own."""

    order: RowOrder
    labels: tuple[str, ...]
    """Names of the sources, in the order of their numbers."""

    tokens: Documents | None
    """The only source where that is tokens on disk; None for text that is tokenised on the way."""

    views: Sequence[View]
    """The documents of each source."""

    notes: list[str]

    @property
    def num_documents(self) -> int | None:
        """Of all sources; None when unknown."""
        counts = [view.count() for view in self.views]
        return None if None in counts else sum(count or 0 for count in counts)

    @property
    def num_tokens(self) -> int | None:
        """Of one pass, [CLS] and [SEP] included; None when unknown, and where weights decide how often a source is
        read."""
        return self._sum_sizes(0)

    @property
    def num_pieces(self) -> int | None:
        """Of one pass; None like `num_tokens`."""
        return self._sum_sizes(1)

    def _sum_sizes(self, part: int) -> int | None:
        if self.views[0].spec.weight is not None:
            return None
        sizes = [view.documents.size(view.span, self.order) for view in self.views]
        return None if None in sizes else sum(size[part] for size in sizes if size is not None)


def build_row_order(config: Config, views: Sequence[View]) -> RowOrder:
    """How documents become rows; indexed tokens afford larger windows than text. Lanes are counted in `build_train`."""
    section = config.dataset
    window = INDEXED_WINDOW if _all_tokenised(views) else STREAM_WINDOW
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


def mix_by_tokens(views: Sequence[View], section: DatasetSection, order: RowOrder) -> tuple[Sequence[View], list[str]]:
    """`views` with weights of their documents that mix tokens as `dataset.mixture_alpha` says, and a note that says so;
    without that key, and of a single source, as they are.

    Raises:
        DataError: the tokens of a source are not known, or there are none.
    """
    if section.mixture_alpha is None or len(views) == 1:
        return views, []
    tokens = [_count_tokens(view, order) for view in views]
    fractions = choose_token_fractions([view.spec.weight for view in views], tokens, section.mixture_alpha)
    # Of a document of its source; rounded, since the order of the rows depends on it and powers differ by machine.
    weights = [
        float(f"{fraction * (view.count() or 1) / count:.9g}")
        for fraction, view, count in zip(fractions, views, tokens)
    ]
    mixed = [replace(view, spec=replace(view.spec, weight=weight)) for view, weight in zip(views, weights)]
    parts = ", ".join(
        f"{fraction:.1%} {view.spec.label} ({count:,} tokens)"
        for fraction, view, count in zip(fractions, views, tokens)
    )
    return mixed, [f"tokens are mixed {parts}; dataset.mixture_alpha: {section.mixture_alpha:g}"]


def choose_token_fractions(weights: Sequence[float | None], tokens: Sequence[int], alpha: float) -> list[float]:
    """The fraction of the tokens of each source: its weight (None: 1) x its tokens ** alpha, scaled to a sum of 1.

    >>> choose_token_fractions([None, None], [900, 100], 0.5)
    [0.75, 0.25]
    """
    parts = [(1.0 if weight is None else weight) * count**alpha for weight, count in zip(weights, tokens)]
    return [part / sum(parts) for part in parts]


def _count_tokens(view: View, order: RowOrder) -> int:
    size = view.documents.size(view.span, order)
    if size is None:
        raise DataError(
            f"dataset.mixture_alpha: needs the number of tokens of every source, and {view.spec.label} is text that is "
            "tokenised on the way; write dataset.streaming: false, which tokenises it once"
        )
    if not size[0]:
        raise DataError(f"dataset.mixture: {view.spec.label} has no tokens to train on; take it out")
    return size[0]


def build_train(
    views: Sequence[View],
    tokenizer: Tokenizer,
    order: RowOrder,
    section: DatasetSection,
    *,
    stream_lanes: int = STREAM_LANES,
    share: Share = alone,
) -> TrainData:
    """Lanes over the training documents of all sources.

    Args:
        stream_lanes: lanes of a stream that is large enough, where the config sets no number.
        share: of what is found in the documents.
    """
    requested = _choose_num_lanes(views, order, section, stream_lanes)
    num_lanes = requested

    def open_quietly(count: int) -> OpenStreams:
        return _stream_opener(views, count, tokenizer, order, section, log=False)

    if section.num_lanes is None:
        weighted = views[0].spec.weight is not None
        num_lanes = share(lambda: fit_num_lanes(requested, open_quietly, order, weighted=weighted))
    order = replace(order, num_lanes=num_lanes)
    if section.shuffle_buffer_size:
        order = replace(order, window_documents=math.ceil(section.shuffle_buffer_size / num_lanes))
    weights = [view.spec.weight for view in views]
    labels = _unique_labels(views)

    def lane_opener() -> Callable[[int], Lane]:
        open_streams = _stream_opener(views, num_lanes, tokenizer, order, section)

        def open_lane(lane: int) -> Lane:
            streams = open_streams(lane)
            if len(streams) == 1:
                return PackingLane(streams[0], order, lane)
            explicit = None if weights[0] is None else [weight or 0.0 for weight in weights]
            mixture = MixtureStream(streams=streams, weights=explicit, labels=labels, seed=order.seed, lane=lane)
            return PackingLane(mixture, order, lane)

        return open_lane

    return TrainData(
        lane_opener=lane_opener,
        order=order,
        labels=labels,
        tokens=views[0].documents if len(views) == 1 and _all_tokenised(views) else None,
        views=views,
        notes=[
            _note_lanes(num_lanes, requested, order),
            *_note_sources(views),
            *share(lambda: _note_sizes(views, open_quietly, num_lanes)),
        ],
    )


def _stream_opener(
    views: Sequence[View],
    num_lanes: int,
    tokenizer: Tokenizer,
    order: RowOrder,
    section: DatasetSection,
    *,
    log: bool = True,
) -> OpenStreams:
    """Gives a function that opens the streams of all sources in lane v."""
    is_mixture = len(views) > 1
    openers = [
        view.documents.streams(
            view.span,
            Sharding(
                # Every source of a mixture has a seed of its own, so that equal sources are not read in the same order.
                seed=key(order.seed, "mixture", number) if is_mixture else order.seed,
                num_lanes=num_lanes,
                shuffle=order.shuffle,
                exact=is_mixture,
            ),
            StreamSettings(
                order=order,
                section=section,
                encode=tokenizer.encode_batch,
                source=number,
                is_mixed=is_mixture,
                log=log,
            ),
        )
        for number, view in enumerate(views)
    ]
    return lambda lane: [opener(lane) for opener in openers]


def _choose_num_lanes(views: Sequence[View], order: RowOrder, section: DatasetSection, most: int) -> int:
    """Lanes as asked for; else as many as the sources offer, and few enough for a small neighbourhood."""
    if section.shuffle_buffer_size == 0:
        return 1
    requested = section.num_lanes
    if requested is None:
        natural = [view.documents.choose_num_lanes(view.span, order, most) for view in views]
        requested = max(natural) if _all_tokenised(views) or len(views) == 1 else min(most, max(natural))
        if section.shuffle_buffer_size is not None:
            requested = max(1, min(requested, section.shuffle_buffer_size // MIN_WINDOW))
    return requested


def _all_tokenised(views: Sequence[View]) -> bool:
    return all(view.documents.is_tokenised for view in views)


def _unique_labels(views: Sequence[View]) -> tuple[str, ...]:
    labels = [hide_credentials(view.spec.label, is_path=True) for view in views]  # They are names in logs and trackers.
    return tuple(f"{x} ({n})" if labels.count(x) > 1 else x for n, x in enumerate(labels))


def _note_lanes(num_lanes: int, requested: int, order: RowOrder) -> str:
    kept = "" if order.shuffle else ", in the order of the source"
    fewer = "" if num_lanes == requested else f" (of {requested} lanes some would find no document to train on)"
    return f"{num_lanes} lanes{fewer}, windows of {order.window_documents} documents{kept}"


def _note_sources(views: Sequence[View]) -> list[str]:
    if len(views) == 1:
        return []
    if views[0].spec.weight is None:
        return ["each document of " + ", ".join(view.spec.label for view in views) + " once per epoch"]
    total = sum(view.spec.weight or 0.0 for view in views)
    fractions = ", ".join(f"{(view.spec.weight or 0.0) / total:.1%} {view.spec.label}" for view in views)
    return [f"documents are drawn {fractions}"]


def _note_sizes(views: Sequence[View], cut: Callable[[int], OpenStreams], num_lanes: int) -> list[str]:
    if len(views) > 1 or views[0].documents.is_indexed:
        return []
    open_streams = cut(num_lanes)
    sizes = [open_streams(lane)[0].size for lane in range(num_lanes)]
    if not min(sizes) or max(sizes) <= 1.1 * min(sizes):
        return []
    return [
        f"the largest lane has {max(sizes) / min(sizes):.1f} times the data of the smallest, which therefore "
        "repeats earlier; files of equal size, or another dataset.num_lanes, even this out"
    ]
