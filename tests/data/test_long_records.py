"""`dataset.max_record_bytes`: a longer record is a bad record with its location in every format, never in memory."""

import gzip
import io
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset
from reading import read_world

from neobert.config.schema_data import DatasetSection
from neobert.data.source.formats import list_splits
from neobert.data.source.record_file import RecordFile
from neobert.data.source.spec import describe_sources
from neobert.data.source.text import Sharding, Span

LIMIT = 200
LONG = "x " * 150
TEXTS = ["one", LONG, "two", "three"]


def as_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_jsonl(folder):
    (folder / "a.jsonl").write_bytes(as_lines(TEXTS))
    return "a.jsonl:2: the record has 313 bytes"


def write_gzip(folder):
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(as_lines(TEXTS)))
    return "a.jsonl.gz:2: the record has 313 bytes"


def write_zstandard(folder):
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(as_lines(TEXTS)))
    return "a.jsonl.zst:2: the record has 313 bytes"


def write_text(folder):
    (folder / "a.txt").write_text("\n".join(TEXTS))
    return "a.txt:2: the record has 301 bytes"


def write_paragraphs(folder):
    (folder / "a.txt").write_text("one\n\n" + "a line of it\n" * 20 + "\ntwo\n\nthree\n")
    return "a.txt:3: the record has 261 bytes"


def write_documents(folder):
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return "1.txt:1: the record has 300 bytes"


def write_csv(folder):
    (folder / "a.csv").write_text("id,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(TEXTS)))
    return "a.csv:3: the record has 303 bytes"


def write_quoted_csv(folder):
    """Only its first line is lost as one that never ends; the others are lines of another number of fields."""
    long = '"x\n' + ", , \n" * 60 + '"'
    (folder / "a.csv").write_text(
        "id,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(["one", long, *TEXTS[2:]]))
    )
    return "a.csv:3: a quotation mark that is not closed (the record has 205"


def write_parquet(folder):
    pq.write_table(pa.table({"text": TEXTS}), folder / "a.parquet")
    return "a.parquet: row group 0, row 2: the record has 300 bytes"


def write_view_parquet(folder):
    pq.write_table(pa.table({"text": pa.array(TEXTS, pa.string_view())}), folder / "a.parquet")
    return "a.parquet: row group 0, row 2: the record has 300 bytes"


def write_dictionary_parquet(folder):
    pq.write_table(pa.table({"text": pa.array(TEXTS).dictionary_encode()}), folder / "a.parquet")
    return "a.parquet: row group 0, row 2: the record has 300 bytes"


def write_saved(folder):
    Dataset.from_dict({"text": TEXTS}).save_to_disk(folder)
    return "the source of 4 documents, number 2: the record has 300 bytes"


def write_hub(folder):
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.jsonl").write_bytes(as_lines(TEXTS))
    return "shard 0 of the data set, record 2: the record has 300 bytes"


FORMATS = {name.removeprefix("write_"): write for name, write in list(globals().items()) if name.startswith("write_")}
SAMPLE_BY = {"paragraphs": "paragraph", "documents": "document"}


def open_source(name, folder, limit=LIMIT):
    sources = (
        {"name": str(folder / "corpus"), "cache_dir": str(folder / "cache")}
        if name == "hub"
        else {"path": (str(folder),)}
    )
    (spec,) = describe_sources(DatasetSection(**sources, sample_by=SAMPLE_BY.get(name, "line"), max_record_bytes=limit))
    return list_splits(spec)["train"](None)


@pytest.mark.parametrize("name", FORMATS)
def test_a_long_record_is_a_bad_record(name, tmp_path):
    problem = FORMATS[name](tmp_path)
    source = open_source(name, tmp_path)
    records = list(source.records())
    assert [record.text for record in records if record.text is not None] == ["one", "two", "three"]
    problems = [record.problem for record in records if record.problem is not None]
    assert problem in problems[0]
    assert "dataset.max_record_bytes is 200" in problems[0]
    assert len(problems) == (62 if name == "quoted_csv" else 1)
    for index, record in enumerate(records):
        after = json.loads(json.dumps(record.cursor))
        rest = [(r.text, r.problem) for r in source.records(Span(after=after))]
        assert rest == [(r.text, r.problem) for r in records[index + 1 :]]
    (reader,) = source.readers(Sharding(seed=0, num_lanes=1))
    assert {r.text for r in reader.read(0, reader.start())} == {"one", "two", "three", None}


@pytest.mark.parametrize("name", FORMATS)
def test_the_limit_is_part_of_the_fingerprint_where_it_is_not_the_usual_one(name, tmp_path):
    FORMATS[name](tmp_path)
    limits = (1 << 26, 1000, 1001)
    sources = [open_source(name, tmp_path, limit) for limit in limits]
    assert all(record.problem is None for source in sources for record in source.records())
    assert len({source.fingerprint for source in sources}) == 3


def test_lines_of_any_length_keep_their_positions():
    content = b"a" * 9 + b"\n" + b"b" * 10 + b"\n" + b"c" * 3_000_000 + b"\nd\n" + b"e" * 20
    file = RecordFile(io.BytesIO(content), 10)
    lines = list(iter(file.read_line, None))
    assert [(line.content[:1], line.size, line.problem is None) for line in lines] == [
        (b"a", 10, True),
        (b"", 11, False),
        (b"", 3_000_001, False),
        (b"d", 2, True),
        (b"", 20, False),
    ]
    file.unread(lines[-2:])
    assert file.tell() == len(content) - 22
    assert [file.read_line(), file.read_line(), file.read_line()] == [*lines[-2:], None]
    rest = RecordFile(io.BytesIO(b"\n".join([b"x" * 20] * 100_000)), 10).read_rest()
    assert (rest[0].content, rest[0].size, rest[1]) == (b"", 2_099_999, 100_000)


@pytest.mark.parametrize("ending", ["txt.gz", "jsonl.zst", "csv.zst"])
def test_a_line_that_unfolds_to_much_more_is_not_held(ending, tmp_path):
    """64 MB of one line in a file of some kilobytes, and a limit of 1 MB."""
    unfolded = {"j": b'{"text": "' + b"x" * (64 << 20) + b'"}\n{"text": "end"}\n', "t": b"x" * (64 << 20) + b"\nend\n"}
    content = unfolded.get(ending[0], b"id,text\n0,good\n1," + b"x" * (64 << 20) + b"\n2,end\n")
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(content, 1) if ending.endswith("gz") else zstandard.compress(content))
    del content, unfolded
    (good,) = describe_sources(DatasetSection(path=str(path), max_record_bytes=1 << 20))
    tracemalloc.start()
    source = list_splits(good)["train"](None)
    records = list(source.records())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert records[-1].text == "end"
    assert [record.problem is None for record in records].count(False) == 1
    assert peak < 32 << 20


def test_a_run_leaves_it_behind_and_so_does_its_resume(tmp_path, make_config, make_data):
    texts = [f"w{n} " * 20 for n in range(40)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(as_lines([*texts[:20], "w1 " * 2000, *texts[20:]])))
    config = make_config(path=str(tmp_path), num_lanes=1, window_documents=8, max_record_bytes=1000, max_bad_records=1)
    expected = read_world(make_data, config, 1, 0, None, 10)
    lane = expected[-1][2]["lanes"]["0"]
    assert lane["epoch"] >= 2
    assert lane["stream"]["bad"] >= 2
    for cut in (1, 2, 7):
        assert read_world(make_data, config, 1, 1, expected[cut - 1][2], 2) == expected[cut : cut + 2]
