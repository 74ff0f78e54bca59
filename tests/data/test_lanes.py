"""Every lane gives each document of its part once an epoch, whole, and continues where a state says."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from neobert.config.schema_data import DatasetSection
from neobert.data.rows import streams as streams_module
from neobert.data.rows.lanes import PackingLane, RowOrder
from neobert.data.rows.order import Permutation, key
from neobert.data.rows.streams import IndexedStream, TextStream
from neobert.data.source.text import Record, cut_end, cut_text
from neobert.errors import DataError

ORDER = RowOrder(seed=3, max_seq_length=12, window_documents=8, min_length=1, truncate=False, packing="best_fit")
KINDS = ("indexed", "text_indexed", "jsonl", "jsonl.gz", "parquet")


class ListStore:
    """Documents in memory; token t of document d is 1000 * d + t."""

    def __init__(self, lengths):
        self._lengths = np.array(lengths)

    def __len__(self):
        return len(self._lengths)

    def lengths(self, documents):
        return self._lengths[documents]

    def content(self, document, start=0, stop=None):
        return (1000 * int(document) + np.arange(self._lengths[document]))[start:stop]


class ListReader:
    """Texts in memory as a reader."""

    size = 0

    def __init__(self, texts):
        self._texts = texts

    def start(self):
        return {"next": 0}

    def read(self, epoch, cursor, skip=frozenset()):
        for number in range(cursor["next"], len(self._texts)):
            text = self._texts[number]
            problem = f"list:{number}: broken" if text == "BAD" else None
            yield Record(number, None if problem or not text else text, problem, {"next": number + 1})


def count_chars(texts):
    return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]


def indexed_lane(store, order, lane, num_lanes):
    last = len(store)
    stream = IndexedStream(store=store, order=order, lane=lane, num_lanes=num_lanes, first=0, last=last)
    return PackingLane(stream, order, lane)


def text_lane(reader, order, lane, max_bad_records=100):
    section = DatasetSection(max_bad_records=max_bad_records)
    stream = TextStream(reader=reader, encode=count_chars, order=order, section=section, lane=lane)
    return PackingLane(stream, order, lane)


def read_epoch(lane, epoch=0):
    """Tokens of one epoch, and the state after it."""
    state, tokens = lane.start(), Counter()
    while state["epoch"] <= epoch:
        window = lane.open(state)
        if state["epoch"] == epoch:
            for piece in (piece for row in window.rows for piece in row):
                tokens.update(np.asarray(window.get(piece)).tolist())
        state = window.next_state
    return tokens, state


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_and_lanes_differ_in_order(kind, corpora, make_config, make_data):
    open_lane = make_data(make_config(path=str(corpora[kind]), window_documents=64)).train.lane_opener()
    lane = open_lane(0)
    first = lane.open(lane.start())
    state = first.next_state
    while state["epoch"] == 0:
        state = lane.open(state).next_state
    again = lane.open(state)
    assert first.rows != again.rows
    assert first.rows == open_lane(0).open(lane.start()).rows


@pytest.mark.parametrize("lane", [0, 3])
def test_rows_of_a_window_have_an_order_of_their_own(lane):
    """Keyed by seed, lane, epoch and number of the window in its epoch."""
    in_order = replace(ORDER, shuffle=False)
    stream = IndexedStream(store=ListStore([5] * 24), order=in_order, lane=0, num_lanes=1, first=0, last=24)
    rows = PackingLane(stream, replace(ORDER, packing="none"), lane)
    state = rows.start()
    for epoch, number in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
        window = rows.open(state)
        documents = [int(window.documents[piece.document]) for (piece,) in window.rows]
        order = Permutation(8, key(ORDER.seed, "rows", lane, epoch, number))(np.arange(8))
        assert documents == (8 * number + order).tolist()
        state = window.next_state


def test_every_epoch_permutes_all_documents_again():
    """A window of another epoch, and of another lane, holds other documents."""
    store = ListStore([5] * 400)
    lane = indexed_lane(store, ORDER, 0, 2)

    def opened(epoch):
        stream = {"epoch": epoch, "position": 0, "offset": 0}
        return set(lane.open({**lane.start(), "epoch": epoch, "stream": stream}).documents.tolist())

    first, second = opened(0), opened(1)
    assert len(first) == len(second) == ORDER.window_documents
    assert len(first & second) < 4
    other = indexed_lane(store, ORDER, 1, 2)
    assert not first & set(other.open(other.start()).documents.tolist())


@pytest.mark.parametrize("window_tokens", [1, 35, 100, 10**6])
def test_a_document_larger_than_a_window_continues_in_the_next(window_tokens, monkeypatch):
    monkeypatch.setattr(streams_module, "WINDOW_TOKENS", window_tokens)
    lengths = [7, 900, 0, 13, 205, 1, 10, 20]
    store = ListStore(lengths)
    found = Counter()
    for number in range(2):
        tokens, state = read_epoch(indexed_lane(store, ORDER, number, 2))
        found += tokens
        assert state["stream"]["offset"] == state["dropped"] == 0
    assert found == Counter(t for d in range(len(lengths)) for t in store.content(d).tolist())


def test_truncation_takes_the_first_piece_even_of_a_huge_document(monkeypatch):
    monkeypatch.setattr(streams_module, "WINDOW_TOKENS", 15)
    store = ListStore([7, 900, 13])
    tokens, _ = read_epoch(indexed_lane(store, replace(ORDER, truncate=True), 0, 1))
    assert sorted(tokens) == [*range(7), *range(1000, 1010), *range(2000, 2010)]


def test_dropped_tails_are_counted_once(monkeypatch):
    monkeypatch.setattr(streams_module, "WINDOW_TOKENS", 25)
    _, state = read_epoch(indexed_lane(ListStore([52, 2, 10, 33]), replace(ORDER, min_length=4), 0, 1))
    assert state["dropped"] == 3


def test_lanes_without_documents_are_an_error():
    for lane in (indexed_lane(ListStore([0, 0]), ORDER, 0, 1), indexed_lane(ListStore([5]), ORDER, 1, 2)):
        with pytest.raises(DataError, match=r"lane \d has no usable documents.*dataset.num_lanes"):
            lane.open(lane.start())
    lane = text_lane(ListReader(["", ""]), ORDER, 4)
    with pytest.raises(DataError, match="lane 4 has no usable documents"):
        lane.open(lane.start())


def test_a_huge_text_is_cut_and_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(streams_module, "WINDOW_CHARS", 50)
    texts = ["short", "many words " * 40, "x" * 300, "end"]
    order = replace(ORDER, max_document_chars=25)
    lane = text_lane(ListReader(texts), order, 0)
    state, text, windows = lane.start(), "", 0
    while state["epoch"] == 0:
        window = lane.open(state)
        assert text_lane(ListReader(texts), order, 0).open(state).rows == window.rows
        pieces = sorted(piece for row in window.rows for piece in row)
        text += "".join(bytes(window.get(piece).astype(np.uint8)).decode() for piece in pieces)
        assert sum(piece.length for piece in pieces) <= 50 + 25
        assert "".join(texts).startswith(text), "no part is read twice: the loop ends"
        state, windows = window.next_state, windows + 1
    assert text == "".join(texts)
    assert windows > 10


def test_cuts_are_at_white_space_where_there_is_some():
    assert list(cut_text("aa bbb cccc ddddddddd", 6)) == ["aa ", "bbb ", "cccc ", "dddddd", "ddd"]
    assert cut_end("one\ntwo", 0, 5) == 4
    assert list(cut_text("abc", 3)) == ["abc"]


def test_bad_and_empty_records_are_counted_and_bounded():
    texts = ["one", "BAD", "", "two", "BAD", "three"]
    order = replace(ORDER, window_documents=2)
    lane = text_lane(ListReader(texts), order, 0, max_bad_records=2)
    _, state = read_epoch(lane, epoch=2)
    stream = state["stream"]
    assert (stream["bad"], stream["skipped"], stream["bad_in_epoch"]) == (6, 3, 0)
    strict = text_lane(ListReader(texts), order, 0, max_bad_records=1)
    with pytest.raises(DataError, match=r"dataset.max_bad_records: 1, but 2 records.*list:4: broken"):
        read_epoch(strict)
