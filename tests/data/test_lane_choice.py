"""An automatic number of lanes never ends a run: where a lane would find nothing there are fewer, at every start."""

import gzip
import json
import random
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from reading import read_world

from neobert.config.schema_data import MixtureSource
from neobert.data.rows.lanes import RowOrder, fit_num_lanes
from neobert.data.source import lines, parquet
from neobert.errors import DataError

GOOD = [" ".join([f"w{n}"] * (6 + n % 9)) for n in range(60)]
HUGE = "w9 " * 4000
SHORT = ["w1 w2"] * 60


def jsonl(path, texts):
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def one_huge_line(folder):
    return {"path": str(jsonl(folder / "a.jsonl", [*GOOD[:30], HUGE, *GOOD[30:]]))}


def one_huge_line_of_text(folder):
    (folder / "a.txt").write_text("\n".join([*GOOD[:30], HUGE, *GOOD[30:]]))
    return {"path": str(folder)}


def sorted_by_length(folder):
    (folder / "a.txt").write_text("\n" * 3000 + "".join(f"{text}\n" for text in sorted(SHORT * 8 + GOOD, key=len)))
    return {"path": str(folder)}


def a_row_group_of_nulls(folder):
    pq.write_table(
        pa.table({"text": [*GOOD[:20], *[None] * 20, *GOOD[20:40]]}), folder / "a.parquet", row_group_size=20
    )
    return {"path": str(folder)}


def row_groups_of_short_texts(folder):
    pq.write_table(pa.table({"text": [*SHORT, *GOOD]}), folder / "a.parquet", row_group_size=10)
    return {"path": str(folder)}


def a_file_of_blanks(folder):
    for number, texts in enumerate((GOOD[:20], [" "] * 20, GOOD[20:40], SHORT)):
        jsonl(folder / f"{number}.jsonl.gz", texts)
    return {"path": str(folder)}


def a_csv_without_text(folder):
    for number, texts in enumerate((GOOD[:20], [""] * 20, GOOD[20:40])):
        (folder / f"{number}.csv").write_text("id,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(texts)))
    return {"path": str(folder), "text_column": "text"}


def bad_records_in_a_range(folder):
    path = jsonl(folder / "a.jsonl", GOOD)
    path.write_bytes(path.read_bytes() + b"{broken\n" * 400)
    return {"path": str(folder), "max_bad_records": 400}


def few_indexed(folder):
    tokens = [[7] * (3 if n % 13 else 9) for n in range(40)]
    Dataset.from_dict({"input_ids": tokens}).save_to_disk(folder / "d")
    return {"path": str(folder / "d"), "window_documents": 1}


def few_indexed_texts(folder):
    Dataset.from_dict({"text": [*GOOD[:1], *[None] * 600]}).save_to_disk(folder / "d")
    return {"path": str(folder / "d")}


def a_neighbourhood(folder):
    return one_huge_line(folder) | {"shuffle_buffer_size": 64 * 16}


def mixed(folder):
    long, short = jsonl(folder / "a.jsonl", SHORT * 3), jsonl(folder / "b.jsonl.gz", GOOD[:4])
    return {"path": None, "mixture": tuple(MixtureSource(path=str(path)) for path in (long, short))}


def mixed_by_weights(folder):
    long, short = jsonl(folder / "a.jsonl", GOOD * 4), jsonl(folder / "b.jsonl", [*GOOD[:2], *[""] * 20])
    return {"path": None, "mixture": tuple(MixtureSource(path=str(path), weight=1.0) for path in (long, short))}


KINDS = [
    one_huge_line,
    one_huge_line_of_text,
    sorted_by_length,
    a_row_group_of_nulls,
    row_groups_of_short_texts,
    a_file_of_blanks,
    a_csv_without_text,
    bad_records_in_a_range,
    few_indexed,
    few_indexed_texts,
    a_neighbourhood,
    mixed,
    mixed_by_weights,
]


@pytest.fixture(autouse=True)
def small_lanes(monkeypatch):
    for module in (lines, parquet):
        monkeypatch.setattr(module, "MIN_LANE_BYTES", 500)


@pytest.fixture
def config_of(tmp_path, make_config):
    def build(kind, **extra):
        values = {"num_lanes": None, "window_documents": None, "min_length": 5} | kind(tmp_path) | extra
        return make_config(**values)

    return build


def usual_lanes(monkeypatch, make_data, config):
    """What there would be if every lane found something."""
    with monkeypatch.context() as patch:
        patch.setattr("neobert.data.rows.training.fit_num_lanes", lambda most, *_, **__: most)
        return make_data(config).train


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_lanes_where_some_find_nothing(kind, config_of, make_data, monkeypatch, caplog):
    """Epochs later and after any restart too: with other processes and threads, the same rows."""
    config = config_of(kind)
    usual, train = usual_lanes(monkeypatch, make_data, config), make_data(config).train
    assert caplog.records == [], "what is bad is reported when it is read, not when lanes are counted"
    assert 1 <= train.order.num_lanes < usual.order.num_lanes
    assert (
        f"{train.order.num_lanes} lanes (of {usual.order.num_lanes} lanes some would find no document" in train.notes[0]
    )
    expected = read_world(make_data, config, 1, 0, None, 4)
    assert expected[-1][2]["num_lanes"] == train.order.num_lanes
    if kind is not mixed_by_weights:
        assert max(lane["epoch"] for lane in expected[-1][2]["lanes"].values()) >= 1
    draw = random.Random(kind.__name__)
    cut, world = draw.randint(0, 2), draw.choice([2, 3, 4])
    state = expected[cut - 1][2] if cut else None
    assert read_world(make_data, config, world, 1, state, 2) == expected[cut : cut + 2]


@pytest.mark.parametrize("kind", [one_huge_line, sorted_by_length, few_indexed, mixed_by_weights])
def test_a_number_that_was_asked_for_may_be_too_large(kind, config_of, make_data, monkeypatch):
    config = config_of(kind)
    num_lanes = usual_lanes(monkeypatch, make_data, config).order.num_lanes
    config = replace(config, dataset=replace(config.dataset, num_lanes=num_lanes))
    with pytest.raises(DataError, match=r"no usable documents.*lower dataset.num_lanes or leave it null"):
        read_world(make_data, config, 1, 0, None, 14)


def test_a_lane_whose_epoch_has_nothing_by_chance_goes_to_the_next(config_of, make_data):
    """Two of ten documents are usable: a permutation may deal both to one of two lanes."""
    config = config_of(few_indexed, num_lanes=2, min_length=9)
    Dataset.from_dict({"input_ids": [[7] * (9 if n < 2 else 3) for n in range(10)]}).save_to_disk(config.dataset.path)
    for seed in range(4):
        try:
            found = read_world(make_data, replace(config, seed=seed), 1, 0, None, 8)
        except DataError:
            continue  # Both documents are in one lane in the first epoch.
        assert min(lane["epoch"] for lane in found[-1][2]["lanes"].values()) > 3
        return
    pytest.fail("no seed deals one document to each lane")


def test_a_source_without_documents_stays_an_error(tmp_path, make_config, make_data):
    jsonl(tmp_path / "a.jsonl", SHORT * 20)
    data = make_data(make_config(path=str(tmp_path), num_lanes=None, min_length=5))
    assert data.train.order.num_lanes == 1
    with pytest.raises(DataError, match=r"lane 0 has no usable documents"):
        next(data.loader())


def test_lanes_that_all_find_something_are_looked_at_once(monkeypatch):
    order = RowOrder(seed=0, max_seq_length=8, window_documents=8, min_length=1, truncate=False, packing="best_fit")
    counts = []

    def cut(num_lanes):
        counts.append(num_lanes)
        return lambda lane: []

    monkeypatch.setattr("neobert.data.rows.lanes._is_filled", lambda *_: True)
    assert fit_num_lanes(16, cut, order, weighted=False) == 16
    assert fit_num_lanes(1, cut, order, weighted=False) == 1
    assert counts == [16]
