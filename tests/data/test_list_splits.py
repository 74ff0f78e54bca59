"""What a path or a name means."""

import json

import pytest
from datasets import Dataset

from neobert.config.schema_data import DatasetSection
from neobert.data.source.formats import StdlibSource, list_splits
from neobert.data.source.spec import describe_sources
from neobert.data.source.text import Sharding, Span
from neobert.errors import DataError


def write(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def splits_of(*paths, **values):
    return list_splits(*describe_sources(DatasetSection(path=tuple(map(str, paths)), **values)))


def texts_of(splits, name="train"):
    return [record.text for record in splits[name](None).records()]


def test_several_paths_are_read_in_the_order_given(tmp_path):
    one = write(tmp_path / "b.jsonl", "b")
    write(tmp_path / "folder" / "z.jsonl", "z")
    write(tmp_path / "folder" / "y.jsonl", "y")
    write(tmp_path / "folder" / "test.jsonl", "t")
    write(tmp_path / "a-1.jsonl", "a1")
    found = splits_of(one, tmp_path / "folder", tmp_path / "a-*.jsonl")
    assert sorted(found) == ["test", "train"]
    assert texts_of(found) == ["b", "y", "z", "a1"]
    assert texts_of(found, "test") == ["t"]


def test_paths_that_are_missing_or_named_twice(tmp_path):
    one = write(tmp_path / "a.jsonl", "a")
    with pytest.raises(DataError, match=r"dataset.path: .*nothing.jsonl does not exist.*take it out of the list"):
        splits_of(one, tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match=r"dataset.path: .*a.jsonl is named twice"):
        splits_of(one, tmp_path)
    with pytest.raises(
        DataError, match=r"nothing.jsonl does not exist; give a folder of save_to_disk, or files ending"
    ):
        splits_of(tmp_path / "nothing.jsonl")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "page.html").write_text("<p>")
    with pytest.raises(DataError, match=r"x has no file that can be read; .*\.csv, \.tsv, \.parquet \(text also comp"):
        splits_of(tmp_path / "x")


def test_kinds_that_cannot_be_read_together(tmp_path):
    write(tmp_path / "train" / "a.jsonl", "a")
    (tmp_path / "train" / "b.csv").write_text("text\nb\n")
    (tmp_path / "test.csv").write_text("text\nt\n")
    found = splits_of(tmp_path)
    assert texts_of(found, "test") == ["t"]
    with pytest.raises(DataError, match=r"mixes JSON and CSV files in one split; .*dataset.mixture"):
        found["train"](None)
    for number in (1, 2):
        Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "saved" / str(number))
    with pytest.raises(DataError, match=r"saved/1 is a folder of save_to_disk .*dataset.mixture"):
        splits_of(tmp_path / "saved" / "1", tmp_path / "saved" / "2")
    with pytest.raises(DataError, match=r"saved contains a folder of save_to_disk .*dataset.mixture"):
        splits_of(tmp_path / "saved")


def test_layouts_that_are_known_and_not_read(tmp_path):
    mds = tmp_path / "mds"
    mds.mkdir()
    (mds / "index.json").write_text('{"version": 2, "shards": []}')
    (mds / "shard.00000.mds").write_bytes(b"x")
    with pytest.raises(DataError, match=r"mosaicml-streaming \(MDS\).*pip install mosaicml-streaming.*train.jsonl"):
        splits_of(mds)
    arrow = tmp_path / "arrow"
    arrow.mkdir()
    (arrow / "data-00000-of-00001.arrow").write_bytes(b"x")
    with pytest.raises(DataError, match=r"bare Arrow file without the state.json .*Dataset.from_file"):
        splits_of(arrow)


def test_python_stdlib_by_number():
    source = StdlibSource()
    assert source.count() == len(source) > 500
    third = source.cursor_after(3)
    assert [r.document for r in source.records(Span(after=third, until=source.cursor_after(5)))] == [3, 4]
    assert source.part(1, 2).after == {"position": len(source) // 2}
    readers = source.readers(Sharding(seed=1, num_lanes=3), Span(until=source.cursor_after(10)))
    assert sorted(r.document for reader in readers for r in reader.read(0, reader.start())) == list(range(10))
