"""The training documents as lanes, and how many there are where that is known."""

from collections.abc import Callable
from dataclasses import dataclass

from neobert.config.schema import Config
from neobert.data.arrow import ArrowTexts, TokenStore, choose_indexed_lanes
from neobert.data.lanes import IndexedLane, Lane, LaneSettings, State
from neobert.data.opening import Opened
from neobert.data.packing import SPECIALS_PER_SEGMENT, piece_lengths
from neobert.data.text import Share, Span
from neobert.data.text_lane import TextLane
from neobert.data.tokenizer import Tokenizer

INDEXED_WINDOW = 1024
STREAM_WINDOW = 256
"""Documents of a window when `dataset.window_documents` is null."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainData:
    """The training documents."""

    lane_opener: Callable[[], Callable[[int], Lane]]
    """Gives a function that opens lane v. Lanes keep files open, so every loader takes a function of its own."""

    num_lanes: int
    store: TokenStore | None
    """Where indexed tokens are; None for text that is tokenised on the way."""

    num_documents: int | None
    num_tokens: int | None
    """Of one pass, [CLS] and [SEP] included."""

    num_pieces: int | None
    notes: list[str]


def build_lane_settings(config: Config, documents: object) -> LaneSettings:
    """How documents become rows; indexed tokens afford larger windows than text."""
    section = config.dataset
    window = INDEXED_WINDOW if isinstance(documents, TokenStore) else STREAM_WINDOW
    full_rows = config.datacollator.pack_sequences and config.trainer.enforce_full_packed_batches
    return LaneSettings(
        seed=config.seed,
        max_seq_length=section.max_seq_length,
        window_documents=section.window_documents or window,
        min_length=section.min_length,
        truncate=config.tokenizer.truncation,
        packing="best_fit" if full_rows else "one_per_row",
        max_document_chars=section.max_document_chars,
        max_bad_records=section.max_bad_records,
    )


def build_train(
    opened: Opened, tokenizer: Tokenizer, settings: LaneSettings, num_lanes: int | None, held_out: State | int | None
) -> TrainData:
    """Lanes over the documents after the held-out ones.

    Args:
        num_lanes: `dataset.num_lanes`; None chooses by the size of the data.
        held_out: where the evaluation documents end: a cursor of text, a number of indexed documents, None for none.
    """
    documents = opened.documents
    if isinstance(documents, TokenStore):
        assert not isinstance(held_out, dict)
        return _indexed(documents, settings, num_lanes, held_out or 0)
    assert not isinstance(held_out, int)

    share = Share(seed=settings.seed, num_lanes=num_lanes, span=Span(after=held_out))

    def lane_opener() -> Callable[[int], Lane]:
        readers = documents.readers(share)
        return lambda lane: TextLane(readers[lane], tokenizer.encode_batch, settings, lane)

    sizes = [r.size for r in documents.readers(share)]
    notes = [f"{len(sizes)} lanes, windows of {settings.window_documents} documents"]
    if min(sizes) and max(sizes) > 1.1 * min(sizes):
        notes.append(
            f"the largest lane has {max(sizes) / min(sizes):.1f} times the data of the smallest, which therefore "
            "repeats earlier; files of equal size, or another dataset.num_lanes, even this out"
        )
    first = held_out["position"] if held_out is not None and isinstance(documents, ArrowTexts) else 0
    return TrainData(
        lane_opener=lane_opener,
        num_lanes=len(sizes),
        store=None,
        num_documents=len(documents) - first if isinstance(documents, ArrowTexts) else None,
        num_tokens=None,
        num_pieces=None,
        notes=notes,
    )


def _indexed(store: TokenStore, settings: LaneSettings, num_lanes: int | None, first: int) -> TrainData:
    count = num_lanes or choose_indexed_lanes(len(store) - first, settings.window_documents)
    lengths = store.all_lengths()[first:]
    _, _, sizes, _ = piece_lengths(lengths, settings.max_seq_length, settings.min_length, truncate=settings.truncate)
    return TrainData(
        lane_opener=lambda: lambda lane: IndexedLane(store, settings, lane, count, first),
        num_lanes=count,
        store=store,
        num_documents=len(lengths),
        num_tokens=int(sizes.sum()) + SPECIALS_PER_SEGMENT * len(sizes),
        num_pieces=len(sizes),
        notes=[f"{count} lanes, windows of {settings.window_documents} documents"],
    )
