"""Text on its way into windows: shards that cannot be read, networks that fail, texts of any size."""

import gzip
import json
import logging
import time
from functools import partial

import numpy as np
import pytest

from neobert.config.schema_data import DatasetSection
from neobert.data.rows import streams as streams_module
from neobert.data.rows.lanes import RowOrder
from neobert.data.rows.streams import TextStream
from neobert.data.source.network import with_retries
from neobert.data.source.text import Record
from neobert.errors import DataError

ORDER = RowOrder(seed=3, max_seq_length=12, window_documents=8, min_length=1, truncate=False, packing="best_fit")


def as_bytes(texts):
    return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]


@pytest.fixture
def damaged(tmp_path, texts):
    """Three gzipped files; the second ends in the middle."""
    for number in range(3):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[50 * number : 50 * number + 50])
        packed = gzip.compress(lines.encode())
        (tmp_path / f"part-{number}.jsonl.gz").write_bytes(packed[: len(packed) // 2] if number == 1 else packed)
    return str(tmp_path)


def read_lane(data, epochs):
    """First token of every piece, by epoch, and all states."""
    lane = data.train.lane_opener()(0)
    state, found, states = lane.start(), [[] for _ in range(epochs)], []
    while state["epoch"] < epochs:
        states.append(state)
        window = lane.open(state)
        found[state["epoch"]] += [int(window.get(piece)[0]) for row in window.rows for piece in row]
        state = json.loads(json.dumps(window.next_state))
    return found, states


def test_a_damaged_file_stops_the_run_and_names_the_remedy(damaged, make_config, make_data):
    with pytest.raises(DataError, match=r"part-1\.jsonl\.gz.*dataset\.on_bad_shard: skip"):
        read_lane(make_data(make_config(path=damaged, num_lanes=1)), 1)


def test_a_damaged_file_is_skipped_from_now_on(damaged, tokenizer, texts, make_config, make_data, caplog):
    data = make_data(make_config(path=damaged, num_lanes=1, on_bad_shard="skip"))
    with caplog.at_level(logging.WARNING):
        found, states = read_lane(data, 3)
    whole = {int(t[0]) for d, t in enumerate(tokenizer.encode_batch(texts)) if not 50 <= d < 100}
    readable = set(found[0]) - whole
    assert set(found[0]) >= whole
    assert len(readable) < 50, "the part before the damage counts once"
    assert set(found[1]) == set(found[2]) == whole
    (message,) = [m for m in caplog.messages if "now and in every epoch" in m]
    assert "part-1.jsonl.gz" in message
    assert states[-1]["stream"]["skipped_shards"] == [1]
    lane = data.train.lane_opener()(0)
    for state in states[:: max(1, len(states) // 7)]:
        assert lane.open(state).rows == data.train.lane_opener()(0).open(state).rows


class Unsteady:
    """A reader whose connection breaks at given records, each time once."""

    size = 0

    def __init__(self, num_texts, breaks):
        self._num_texts, self._breaks = num_texts, list(breaks)

    def start(self):
        return {"next": 0}

    def read(self, epoch, cursor, skip=frozenset()):
        for number in range(cursor["next"], self._num_texts):
            if number in self._breaks:
                self._breaks.remove(number)
                raise ConnectionResetError("reset by peer")
            yield Record(number, f"text {number}", None, {"next": number + 1})


def take_all(reader, retries):
    section = DatasetSection(network_retries=retries)
    stream = TextStream(reader=reader, encode=as_bytes, order=ORDER, section=section, lane=0)
    state, documents = stream.start(), []
    while state["epoch"] == 0:
        taken = stream.take(state, 8)
        documents += taken.documents.tolist()
        state = taken.next_state
    return documents, state


def test_a_window_is_read_again_after_a_network_error(monkeypatch):
    waited = []
    monkeypatch.setattr(streams_module, "with_retries", partial(with_retries, sleep=waited.append))
    assert take_all(Unsteady(40, [3, 3, 17, 39]), retries=2) == take_all(Unsteady(40, []), retries=0)
    assert waited == [1, 2, 1, 1]


def test_a_network_that_stays_away_ends_with_a_sentence(monkeypatch):
    monkeypatch.setattr(streams_module, "with_retries", partial(with_retries, sleep=lambda seconds: None))
    with pytest.raises(DataError, match=r"dataset\.network_retries"):
        take_all(Unsteady(40, [5] * 9), retries=3)


@pytest.mark.parametrize("text", ["word " * 2_000_000, "x" * 10_000_000], ids=["ten megabytes", "one word of that"])
def test_a_document_of_ten_megabytes_is_read_in_bounded_parts(text, make_config, make_data, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "w1 w2"}) + "\n")
    data = make_data(make_config(path=str(path), num_lanes=1, max_document_chars=1_000_000))
    largest, encode = [], type(data.tokenizer).encode_batch

    def measured(self, texts):
        largest.append(max(map(len, texts)))
        return encode(self, texts)

    monkeypatch.setattr(type(data.tokenizer), "encode_batch", measured)
    started = time.monotonic()
    lane = data.train.lane_opener()(0)
    state, windows = lane.start(), 0
    while state["epoch"] == 0:
        state, windows = lane.open(state).next_state, windows + 1
    assert max(largest) <= 1_000_000
    assert windows >= 2, "four million characters a window"
    assert time.monotonic() - started < 60
