"""Plain text, CSV and Parquet: what a document is, and what a bad one is."""

import csv
import gzip
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neobert.config.schema_data import DatasetSection
from neobert.data.source.files import DataFile, local_file
from neobert.data.source.formats import list_splits
from neobert.data.source.lines import FileShard
from neobert.data.source.plain import SAMPLE_BY, Paragraphs
from neobert.data.source.record_file import RecordFile
from neobert.data.source.spec import describe_sources
from neobert.data.source.text import Span
from neobert.errors import DataError


def open_source(path, **values):
    return list_splits(*describe_sources(DatasetSection(path=str(path), **values)))["train"](None)


def texts_of(source):
    return [record.text for record in source.records()]


def problems_of(source):
    return [record.problem for record in source.records() if record.problem]


def test_what_a_document_of_plain_text_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo  \r\n\r\n \t\r\n  three\nfour\n\n")
    assert texts_of(open_source(path)) == ["one", "two", None, None, "  three", "four", None]
    assert texts_of(open_source(path, sample_by="paragraph")) == ["one\ntwo", "  three\nfour"]
    assert texts_of(open_source(path, sample_by="document")) == ["one\ntwo  \n\n \t\n  three\nfour"]
    assert open_source(path).notes == [
        "one document a line of plain text (dataset.sample_by: line; or paragraph, document)"
    ]
    assert open_source(path, sample_by="document").notes[0].startswith("one document a file of plain text")


@pytest.mark.parametrize(("sample_by", "bad"), [("line", [5]), ("paragraph", [5]), ("document", [5])])
@pytest.mark.parametrize("suffix", ["txt", "text.gz"])
def test_invalid_utf8_is_reported_with_its_line(tmp_path, sample_by, bad, suffix):
    path = tmp_path / f"a.{suffix}"
    content = b"one\ntwo\n\nthree\nca\xe9\nfive\n\nsix\0stays\n"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    source = open_source(path, sample_by=sample_by)
    assert [problem.split(": ")[0] for problem in problems_of(source)] == [f"{path}:{n}" for n in bad]
    good = {"line": ["one", "two", "three", "five", "six\0stays"], "paragraph": ["one\ntwo", "six\0stays"]}
    assert [text for text in texts_of(source) if text] == good.get(sample_by, [])
    later = list(source.records(Span(after={"shard": 0, "position": {"offset": 9, "line": None}})))
    if sample_by != "document":
        assert [r.problem.split(": ")[0] for r in later if r.problem] == [f"{path}:{n}" for n in bad]


@pytest.mark.parametrize("sample_by", ["line", "paragraph"])
def test_byte_ranges_anywhere_split_every_document_once(tmp_path, sample_by):
    """All pairs of neighbouring ranges of a small file: cuts fall into texts, gaps, and the marks between them."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\none\ntwo\n\n\n \nthree\r\n\r\n\r\nfour\n\n five\nsix\n \n\n")
    file, form = local_file(path), SAMPLE_BY[sample_by]
    whole = [(r.document, r.text) for r in FileShard(file, 0, form).read(None)]
    assert len([text for _, text in whole if text]) == (6 if sample_by == "line" else 4)
    for cut in range(1, file.size):
        parts = [FileShard(file, 0, form, 0, cut), FileShard(file, 0, form, cut, file.size)]
        assert [(r.document, r.text) for part in parts for r in part.read(None)] == whole, cut


def test_borders_of_paragraphs_stay_where_they_are(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\none\ntwo\n\n\n \nthree\r\n\r\nfour\n")
    with path.open("rb") as file:
        borders = [Paragraphs().align(RecordFile(file), begin) for begin in range(1, path.stat().st_size)]
        assert sorted(set(borders)) == [11, 23, 28]
        assert [Paragraphs().align(RecordFile(file), border) for border in (11, 23)] == [11, 23]


def test_csv_with_quotes_and_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbfid,text\r\n1,plain\r\n2,"two\r\nlines, and ""quotes"""\r\n\r\n3,\r\n'
        b'4,too,many\r\n5,"ca\xe9"\r\n6,end\r\n'
    )
    source = open_source(path)
    assert source.notes == ["text from column 'text'"]
    assert texts_of(source) == ["plain", 'two\r\nlines, and "quotes"', None, None, None, None, "end"]
    assert [problem.split(": ", 1) for problem in problems_of(source)] == [
        [f"{path}:7", "3 fields, and the header has 2"],
        [f"{path}:8", "'utf-8' codec can't decode byte 0xe9 in position 5: invalid continuation byte"],
    ]


def test_a_quote_that_never_ends_is_one_bad_record_of_one_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text\none\n"two\nthree\nfour\n')
    assert texts_of(open_source(path)) == ["one", None, "three", "four"]
    assert problems_of(open_source(path)) == [f"{path}:3: a quotation mark that is not closed (unexpected end of data)"]


def test_a_field_larger_than_the_usual_limit(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("text\tn\n" + "x " * 200_000 + "\t1\n")
    assert [len(text) for text in texts_of(open_source(path))] == [400_000]
    assert csv.field_size_limit() > 400_000


def test_columns_of_csv(tmp_path):
    (tmp_path / "a.csv").write_text("id,title,body\n1,x,some words\n")
    assert texts_of(open_source(tmp_path, text_column="body")) == ["some words"]
    with pytest.raises(DataError, match=r"dataset.text_column is null .* name one of title, body"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"dataset.text_column: 'id' holds no text"):
        open_source(tmp_path, text_column="id")
    with pytest.raises(DataError, match=r"dataset.text_column: 'txt' is not in .*text columns there: title, body"):
        open_source(tmp_path, text_column="txt")
    (tmp_path / "b.csv").write_text("id,title\n1,x\n")
    with pytest.raises(DataError, match=r"the header of .*b.csv is id, title; every file needs column 'body'"):
        open_source(tmp_path, text_column="body")
    (tmp_path / "b.csv").write_text("body,id,title\nother order,1,x\n")
    assert texts_of(open_source(tmp_path, text_column="body")) == ["some words", "other order"]


def test_a_mark_before_the_header(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,n\r\none,1\r\n")
    source = open_source(tmp_path)
    assert source.notes == ["text from column 'text'"]
    assert texts_of(source) == ["one"]


def test_jsonl_with_a_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert texts_of(open_source(path)) == ["one", "two"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_columns_of_text(tmp_path, kind):
    table = pa.table({"n": [1, 2, 3], "body": pa.array(["x", None, "x"], pa.string()).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(tmp_path)
    assert source.notes == ["text from column 'body', the only one with text"]
    assert texts_of(source) == ["x", None, "x"]
    with pytest.raises(DataError, match=r"dataset.text_column: 'n' holds no text"):
        open_source(tmp_path, text_column="n")


def test_only_the_text_column_is_read(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).bytes
    table = pa.table({"text": [f"t{n}" for n in range(50)], "blob": [noise(40_000) for _ in range(50)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    num_bytes = []

    class Watched(io.FileIO):
        def read(self, size=-1):
            content = super().read(size)
            num_bytes.append(len(content))
            return content

    monkeypatch.setattr(DataFile, "open_raw", lambda self: Watched(self.url))
    assert len(texts_of(open_source(tmp_path, text_column="text"))) == 50
    assert 0 < sum(num_bytes) < 400_000 < (tmp_path / "a.parquet").stat().st_size / 5


def test_parquet_files_that_differ_or_hold_tokens(tmp_path):
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"title": ["x y"], "body": ["x z"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet has no text column 'text' \(columns: title, body\)"):
        open_source(tmp_path)
    pq.write_table(pa.table({"content": ["y"]}), tmp_path / "b.parquet")
    assert texts_of(open_source(tmp_path)) == ["x", "y"]
    pq.write_table(pa.table({"input_ids": [[1, 2]]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c.parquet holds input_ids and no text.*load_dataset.*save_to_disk"):
        open_source(tmp_path / "c.parquet")
