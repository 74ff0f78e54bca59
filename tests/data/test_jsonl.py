import gzip
import json
import logging

import pytest

from neobert.data.source.files import DataFile, local_file
from neobert.data.source.jsonl import JsonLines, open_jsonl
from neobert.data.source.lines import FileShard
from neobert.data.source.sharing import choose_num_lanes, cut_ranges
from neobert.data.source.spec import SourceSpec
from neobert.data.source.text import BadShard, Sharding
from neobert.errors import DataError


def open_files(paths, column):
    return open_jsonl([local_file(p) for p in sorted(paths)], SourceSpec(path=("here",), text_column=column))


def open_shard(path, number, column, begin=0, end=None):
    return FileShard(local_file(path), number, JsonLines(column), begin, end, None if begin else 0)


def read_all(source, num_lanes):
    records = []
    for reader in source.readers(Sharding(seed=0, num_lanes=num_lanes)):
        records += reader.read(0, reader.start())
    return records


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 7, 40])
def test_byte_ranges_split_every_line_once(tmp_path, num_lanes):
    texts = [f"text {n} " + "é" * (n * 7 % 50) for n in range(60)]
    for name, part in (("a.jsonl", texts[:25]), ("b.jsonl", texts[25:])):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in part]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    source = open_files([tmp_path / "b.jsonl", tmp_path / "a.jsonl"], None)
    records = read_all(source, num_lanes)
    assert sorted(r.text for r in records) == sorted(texts)
    assert len({r.document for r in records}) == 60
    assert [r.text for r in source.records()] == texts


def test_a_range_may_start_exactly_at_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [r.text for r in open_shard(path, 0, "text", 0, 16).read(None)] == ["one"]
    assert [r.text for r in open_shard(path, 0, "text", 16, 32).read(None)] == ["two"]
    assert [r.text for r in open_shard(path, 0, "text", 15, 32).read(None)] == ["two"]
    assert [r.text for r in open_shard(path, 0, "text", 17, 32).read(None)] == []


def test_cut_ranges_literally():
    assert list(cut_ranges([(0, 0, 6), (1, 0, 4)], 2)) == [[(0, 0, 5)], [(0, 5, 6), (1, 0, 4)]]
    assert list(cut_ranges([(0, 3, 6), (2, 0, 1)], 4)) == [[(0, 3, 4)], [(0, 4, 5)], [(0, 5, 6)], [(2, 0, 1)]]
    assert list(cut_ranges([(0, 5, 5)], 1)) == [[]]


@pytest.mark.parametrize(
    ("shards", "lanes"), [(1, 1), (5, 5), (16, 16), (17, 9), (20, 10), (24, 12), (41, 15), (1000, 16)]
)
def test_lanes_split_files_evenly(shards, lanes):
    assert choose_num_lanes(shards) == lanes


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_bad_lines_are_named_with_file_and_line(tmp_path, suffix):
    lines = [
        b'{"text": "good"}',
        b'{"text": "broken',
        b'{"text": "caf\xe9"}',
        b'{"text": "half \\ud800"}',
        b"[1, 2]",
        b"",
        b'{"text": null}',
        b'{"text": "  "}',
        b'{"text": 3}',
        b'{"other": "x"}',
        b'{"text": "nul \\u0000 stays"}',
        b'{"text": "cut off',
    ]
    path = tmp_path / f"a{suffix}"
    with gzip.open(path, "wb") if suffix.endswith("gz") else path.open("wb") as file:
        file.write(b"\n".join(lines))
    records = list(open_files([path], "text").records())
    assert [r.text for r in records if r.text] == ["good", "nul \0 stays"]
    problems = [r.problem for r in records if r.problem]
    assert [problem.split(": ")[0] for problem in problems] == [f"{path}:{n}" for n in (2, 3, 4, 5, 12)]
    assert sum(r.text is None and r.problem is None for r in records) == 5
    later = list(open_shard(path, 0, "text", begin=34 if suffix.endswith("gz") else 20, end=400).read(None))
    assert [r.problem.split(": ")[0] for r in later if r.problem] == [f"{path}:{n}" for n in (3, 4, 5, 12)]


def test_bad_lines_are_logged(tmp_path, make_config, make_data, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1 w2"}\nnot json\n' * 30)
    data = make_data(make_config(path=str(path), num_lanes=1))
    with caplog.at_level(logging.WARNING):
        loader = data.loader()
        state = [next(loader) for _ in range(3)][-1].state
    assert [record.message.split(": ")[1] for record in caplog.records] == [f"{path}:{2 * n}" for n in range(1, 31)]
    epochs = state["lanes"]["0"]["epoch"]
    assert epochs > 1
    assert 30 * epochs <= data.counters(state)["bad"] <= 30 * (epochs + 1)


def test_gz_windows_keep_the_file_open(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": f"t{n}"}) + "\n" for n in range(50))
    opened = []
    real = DataFile.open
    monkeypatch.setattr(DataFile, "open", lambda self: opened.append(self) or real(self))
    shard = open_shard(path, 0, "text")
    position, texts = None, []
    for _ in range(5):
        records = shard.read(position)
        for _ in range(10):
            record = next(records)
            texts.append(record.text)
        records.close()
        position = record.cursor
    assert texts == [f"t{n}" for n in range(50)]
    assert len(opened) == 1
    assert next(shard.read({"offset": 0, "line": 0})).text == "t0"
    assert len(opened) == 2


def test_damaged_gz_names_the_file(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": f"text {n * 7919 % 1000}"}) + "\n" for n in range(5000))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(BadShard, match=r"a.jsonl.gz cannot be decompressed"):
        list(open_files([path], None).records())


def test_columns_are_chosen_or_named_in_the_error(tmp_path):
    def source(column, **record):
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(record) + "\n")
        return open_files([path], column)

    assert source(None, content="x", text="y").notes == ["text from column 'text'"]
    assert source(None, sentence="x", title="y", n=1).notes == ["text from column 'sentence'"]
    assert source(None, body="x", n=1).notes == ["text from column 'body', the only one with text"]
    assert source("title", title="x", text="y").notes == ["text from column 'title' (dataset.text_column)"]
    with pytest.raises(DataError, match=r"dataset.text_column: 'txt' is not in .*text columns there: text, title"):
        source("txt", text="x", title="y")
    with pytest.raises(DataError, match=r"dataset.text_column: 'n' holds no text"):
        source("n", text="x", n=1)
    with pytest.raises(DataError, match="name one of body, title"):
        source(None, body="x", title="y")
    with pytest.raises(DataError, match="has no text column"):
        source(None, n=1)


def test_a_json_array_of_texts_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('["x", "y"]')
    with pytest.raises(DataError, match=r"a.json has no text: .* a JSON object was expected, not list"):
        open_files([path], None)
    path.write_text('{"data": [{"text": "x"}]}')
    with pytest.raises(DataError, match=r"no text column \(columns: data \(list of objects\)\).*jq -c '\.\[\"data\"\]"):
        open_files([path], None)


def test_fingerprint_sees_an_edit_of_equal_size(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')
    before = open_files([path], None).fingerprint
    assert open_files([path], None).fingerprint == before
    path.write_text('{"text": "two"}\n')
    assert open_files([path], None).fingerprint != before
