"""As many lanes as find documents: an automatic number of lanes never ends a run.

A source is cut by what it tells of its size, and not all of it need be documents: one line may be larger than many
ranges, files sorted by length begin with empty texts, a row group holds nulls. Every lane is asked for its first
document; while some have none, the source is cut anew for as many lanes as had one. That is a function of the data and
the settings alone, so every process and every resume finds the same number, and the data state holds it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from neobert.data.lanes import DocumentStream, LaneSettings
from neobert.data.packing import split_documents

_THREADS = 8

OpenStreams = Callable[[int], Sequence[DocumentStream]]
"""Lane -> its stream of each source."""


def fit_num_lanes(most: int, cut: Callable[[int], OpenStreams], settings: LaneSettings, *, weighted: bool) -> int:
    """The number of lanes, at most `most`, of which each finds a document in its first epoch; 1 when nothing does.

    Args:
        cut: the streams of a number of lanes.
        weighted: whether documents are drawn by the weights of the sources, which needs one of every source.
    """
    num_lanes = most
    while num_lanes > 1:
        open_streams = cut(num_lanes)
        with ThreadPoolExecutor(_THREADS) as threads:
            lanes = [threads.submit(_is_filled, open_streams(lane), settings, weighted) for lane in range(num_lanes)]
            num_filled = sum(lane.result() for lane in lanes)
        if num_filled == num_lanes:
            break
        num_lanes = max(1, num_filled)
    return num_lanes


def _is_filled(streams: Sequence[DocumentStream], settings: LaneSettings, weighted: bool) -> bool:
    def has_pieces(lengths: NDArray[np.int64]) -> bool:
        limits = (settings.max_seq_length, settings.min_length)
        return bool(split_documents(lengths, *limits, truncate=settings.truncate)[0])

    if weighted and not all(_finds(stream, len, settings) for stream in streams):
        return False
    return any(_finds(stream, has_pieces, settings) for stream in streams)


def _finds(stream: DocumentStream, is_enough: Callable[[NDArray[np.int64]], int], settings: LaneSettings) -> bool:
    """Whether the first epoch has documents with these lengths; few are read where the first ones do."""
    state, count = stream.start(), 1
    while True:
        taken = stream.take(state, count)
        if is_enough(taken.lengths):
            return True
        if taken.ended:
            return False
        state, count = taken.next_state, min(2 * count, settings.window_documents)
