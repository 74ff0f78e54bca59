"""What files are: read or not and why, in which split, with which text; before anything is trained on them."""

import bz2
import doctest
import gzip
import io
import json
import lzma
import os
import tracemalloc
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from neobert.config.schema_data import DatasetSection
from neobert.data.source import codecs as decompress
from neobert.data.source import files, intake
from neobert.data.source import spec as columns
from neobert.data.source.formats import list_data_files, list_splits
from neobert.data.source.inventory import FileReport, Inventory
from neobert.data.source.spec import SourceSpec, describe_sources
from neobert.data.source.splits import find_split
from neobert.data.source.text import Sharding, Span
from neobert.errors import DataError

TEXTS = [f"the text number {n}" for n in range(3)]
OBJECTS = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(item) + "\n" for item in OBJECTS)
PLAIN = "".join(text + "\n" for text in TEXTS)
CSV = "id,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(TEXTS))
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"


def parquet(**values):
    return parquet_of(pa.table(values))


def parquet_of(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def open_source(path, split="train", **values):
    return list_splits(*describe_sources(DatasetSection(path=str(path), **values)))[split](None)


def texts_of(source):
    return [record.text for record in source.records() if record.text]


def test_what_is_said_of_addresses_has_no_secrets():
    signed = "https://host/data/text.{}?X-Amz-Signature=5f3/a9c"
    found = Inventory(
        files=(
            FileReport(url=signed.format("jsonl"), split="test", word="test", content=("xz",), column="a"),
            FileReport(url=signed.format("csv"), split="train", column="b", remark=f"see {signed.format('csv')}"),
            FileReport(url=signed.format("doc"), problem=".doc"),
        )
    )
    said = "\n".join([*found.notes(), *found.warnings(), *found.table()])
    assert said.count("<hidden:X-Amz-Signature>") == 10
    assert "a9c" not in said


READ = {
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16_big_endian.jsonl": b"\xfe\xff" + LINES.encode("utf-16-be"),
    "utf16.csv": CSV.encode("utf-16"),
    "utf16.jsonl.gz": gzip.compress(LINES.encode("utf-16")),
    "utf32.txt": PLAIN.encode("utf-32"),
    "list.json": json.dumps(OBJECTS).encode(),
    "list_over_lines.json": b"\n\n " + json.dumps(OBJECTS, indent=2).encode(),
    "list_of_lines.json": ("[\n" + ",\n".join(map(json.dumps, OBJECTS)) + "\n]").encode(),
    "objects_in_one_line.jsonl": "".join(map(json.dumps, OBJECTS)).encode(),
    "objects_over_lines.json": "\n".join(json.dumps(item, indent=1) for item in OBJECTS).encode(),
    "commas_behind_lines.jsonl": LINES.replace("}\n", "},\n").encode(),
    "commas_in_objects.jsonl": LINES.replace("}\n", ",}\n").encode(),
    "old_line_ends.jsonl": LINES.replace("\n", "\r").encode(),
    "old_line_ends.txt": PLAIN.replace("\n", "\r").encode(),
    "old_line_ends.csv": CSV.replace("\n", "\r").encode(),
    "gzip.jsonl": gzip.compress(LINES.encode()),
    "zstd.txt": zstandard.compress(PLAIN.encode()),
    "a.jsonl.xz": lzma.compress(LINES.encode()),
    "a.csv.bz2": bz2.compress(CSV.encode()),
    "A.TXT.BZ2": bz2.compress(PLAIN.encode()),
    "binary.parquet": parquet(text=pa.array([text.encode() for text in TEXTS], pa.binary())),
    "address_and_body.jsonl": jsonl(*({"url": f"https://a.b/{n}", "body": text} for n, text in enumerate(TEXTS))),
}


@pytest.mark.parametrize("name", READ)
def test_content_that_is_read_whatever_the_name_says(name, tmp_path):
    (tmp_path / name).write_bytes(READ[name])
    source = open_source(tmp_path)
    records = list(source.records())
    assert texts_of(source) == TEXTS
    for record in records:  # A cursor holds in a form that is recoded, as in any other.
        assert (
            list(source.records(Span(after=json.loads(json.dumps(record.cursor)))))
            == records[records.index(record) + 1 :]
        )
    (reader,) = source.readers(Sharding(seed=1, num_lanes=1))
    first = list(islice(reader.read(0, reader.start()), 2))
    assert [*first, *reader.read(0, first[-1].cursor)] == list(reader.read(0, reader.start()))


TWO_OF_A_NAME = parquet_of(pa.table([["x y"], ["z"]], names=["text", "text"]))

REFUSED = {
    "latin1.jsonl": (
        '{"text": "café"}\n'.encode("latin-1"),
        r"has no text: .*line 1: 'utf-8' codec.*iconv -f ISO-8859-1",
    ),
    "latin1.txt": ("café\nnaïve\n".encode("latin-1"), "iconv -f ISO-8859-1 -t UTF-8 latin1.txt"),
    "latin1_over_lines.json": (
        '[\n{"text":\n"café"}]'.encode("latin-1"),
        "value 1: 'utf-8' codec.*iconv -f ISO-8859-1",
    ),
    "latin1.csv": ("id,text\n1,café\n".encode("latin-1"), "iconv -f ISO-8859-1"),
    "no_mark.jsonl": (LINES.encode("utf-16-le"), "UTF-16LE without its mark"),
    "zeros.txt": (bytes(300), "only zero bytes"),
    "nested.json": (json.dumps({"data": OBJECTS}, indent=1).encode(), r"columns: data \(list of objects\).*jq -c"),
    "strings.json": (json.dumps(TEXTS).encode(), "a JSON object was expected, not list"),
    "cut.json": (json.dumps(OBJECTS, indent=1).encode()[:-9], "last JSON value does not end"),
    "python.jsonl": (b"{'text': 'x y'}\n", "line 1: Expecting property name"),
    "pointer.jsonl": (POINTER, "Git LFS pointer, not the file; `git lfs pull`"),
    "pointer.txt": (POINTER, "Git LFS pointer"),
    "pointer.csv": (POINTER, "Git LFS pointer"),
    "pointer.parquet": (POINTER, "Git LFS pointer"),
    "pointer.jsonl.gz": (POINTER, "Git LFS pointer"),
    "pointer_with_a_mark.txt": (b"\xef\xbb\xbf" + POINTER, "Git LFS pointer"),
    "annexed.txt": (b"/annex/objects/SHA256E-s1--a.txt\n", "git-annex pointer"),
    "page.jsonl": (PAGE, "web page, not data"),
    "page.txt": (b"\n<HTML lang=en><head>", "web page, not data"),
    "page_of_xml.txt": (b'<?xml version="1.0"?>\n' + PAGE, "web page, not data"),
    "answer.txt": (b"<Error><Code>NoSuchKey</Code></Error>", "web page, not data"),
    "archive.txt": (b"a.txt".ljust(257, b"a") + b"ustar\x0000" + b"words and words\n" * 300, "a tar archive"),
    "page.parquet": (PAGE, "web page, not data"),
    "page.txt.gz": (gzip.compress(PAGE), "web page, not data"),
    "named_gz.jsonl.gz": (LINES.encode(), "is not gzip, as its name says: it starts with '{"),
    "archive.jsonl": (b"PK\x03\x04" + bytes(90), "a zip archive"),
    "lines.parquet": (LINES.encode(), "is no Parquet file: it starts with"),
    "version.jsonl": (jsonl({"version": "1.0.2", "n": 1}), r"no text column \(columns: version, n \(number\)\)"),
    "address.csv": (b"url,n\nhttps://a.b/c,1\n", r"no text column \(columns: url, n\)"),
    "address.parquet": (parquet(url=["https://a.b/c"], n=[1]), r"no text column \(columns: n, url\)"),
    "binary_column.parquet": (parquet(body=pa.array([b"x y"], pa.binary())), r"columns: body \(binary\)"),
    "list_column.parquet": (parquet(text=[["x"]], n=[1]), r"columns: text \(list\), n"),
    "numbers.jsonl": (jsonl({"text": 1}), r"columns: text \(number\)"),
    "columns.json": (json.dumps({"text": TEXTS}).encode(), r"columns: text \(list\)"),
    "nothing.json": (b"[]", "none of its 1 files has a record"),
    "two_of_a_name.parquet": (TWO_OF_A_NAME, r"columns: text \(2 columns\)"),
    "null.parquet": (parquet(text=pa.array([None], pa.null())), "all of its 1 files are empty"),
    "no_columns.parquet": (parquet(), "all of its 1 files are empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_content_that_is_no_text_is_named_with_its_cause(name, tmp_path):
    content, words = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        texts_of(open_source(tmp_path))


@pytest.mark.parametrize("name", ["pointer.jsonl", "pointer.parquet", "page.txt", "latin1.csv", "version.jsonl"])
def test_a_file_without_text_is_a_bad_shard(name, tmp_path):
    ending = name.split(".")[1]
    good = {"jsonl": LINES.encode(), "txt": PLAIN.encode(), "csv": CSV.encode(), "parquet": parquet(text=TEXTS)}[ending]
    (tmp_path / f"a.{ending}").write_bytes(good)
    (tmp_path / name).write_bytes(REFUSED[name][0])
    with pytest.raises(DataError, match=rf"{name} .*dataset.on_bad_shard: skip"):
        open_source(tmp_path)
    source = open_source(tmp_path, on_bad_shard="skip")
    assert texts_of(source) == TEXTS
    (warning,) = source.inventory.warnings()
    assert f"1 file not read: {tmp_path.name}/{name} (" in warning
    (report,) = (line for line in source.inventory.as_lines() if "problem" in line)
    assert report["url"] == str(tmp_path / name)
    assert report["is_fault"]


@pytest.mark.parametrize(
    ("below", "split", "word"),
    [
        (["c4-validation.00001-of-00008.json"], "validation", "validation"),
        (["val-0.jsonl"], "validation", "val"),
        (["Test_1.json"], "test", "Test"),
        (["my.dev.jsonl"], "dev", "dev"),
        (["eval2019.jsonl"], "eval", "eval"),
        (["en", "testing", "a.jsonl"], "test", "testing"),
        (["train", "test_me.jsonl"], "train", "train"),
        (["training_camp.jsonl"], "train", "training"),
        (["testimonials.jsonl"], "train", None),
        (["devices_manual.jsonl"], "train", None),
        (["evaluations_2019.jsonl"], "train", None),
        (["latest.jsonl"], "train", None),
        (["développement.jsonl"], "train", None),
        (["validé.jsonl"], "train", None),
    ],
)
def test_split_words_are_whole_words(below, split, word):
    assert find_split(below) == (split, word)


def write(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jsonl({"text": text}))


def listed(path, **values):
    found = list_data_files(*describe_sources(DatasetSection(path=str(path), **values)))
    names = {split: [os.path.basename(file.url) for file in found.files_of(split)] for split in found.splits.values()}
    return names, {os.path.basename(r.url): r.problem for r in found.inventory.files if r.problem is not None}


def test_links_are_followed_and_circles_are_not(tmp_path):
    write(tmp_path / "data" / "x.jsonl")
    write(tmp_path / "elsewhere" / "y.jsonl")
    (tmp_path / "data" / "more").symlink_to("../elsewhere")
    for path in (tmp_path / "data", f"{tmp_path}/data/**/*.jsonl"):
        assert listed(path) == ({"train": ["y.jsonl", "x.jsonl"]}, {})
    for name, target in (("loop", "."), ("up", ".."), ("again", "more")):
        (tmp_path / "data" / name).symlink_to(target)
    for path in (tmp_path / "data", f"{tmp_path}/data/**/*.jsonl"):
        names, left_out = listed(path)
        assert names == {"train": ["y.jsonl", "x.jsonl"]}
        assert left_out["loop"] == left_out["up"] == "is a link back to a folder that it is in"
        assert (
            len([name for name in ("again", "more") if "is a link to the folder that" in left_out.get(name, "")]) == 1
        )


def test_a_file_that_is_reached_twice_is_read_once(tmp_path):
    write(tmp_path / "parts" / "p.jsonl")
    write(tmp_path / "parts" / "q.jsonl")
    (tmp_path / "r.jsonl").symlink_to("parts/p.jsonl")
    (tmp_path / "validation.jsonl").symlink_to("parts/q.jsonl")
    names, left_out = listed(tmp_path)
    assert names == {"train": ["p.jsonl"], "validation": ["validation.jsonl"]}
    assert left_out["r.jsonl"] == f"the same file as {tmp_path}/parts/p.jsonl"
    (tmp_path / "test.jsonl").symlink_to("parts/q.jsonl")
    with pytest.raises(DataError, match=r"in two splits by its links: .*test.jsonl \(test\) and .*validation.jsonl"):
        listed(tmp_path)


def test_links_that_lead_nowhere(tmp_path):
    write(tmp_path / "x.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(DataError, match=r"gone.jsonl is a link to nowhere.jsonl, which is not there.*on_bad_shard"):
        listed(tmp_path)
    assert listed(tmp_path, on_bad_shard="skip")[0] == {"train": ["x.jsonl"]}
    (tmp_path / "x.jsonl").unlink()
    with pytest.raises(DataError, match="no other file is left"):
        listed(tmp_path, on_bad_shard="skip")


def test_a_name_that_is_no_utf8(tmp_path):
    (tmp_path / "caf\udce9.jsonl").write_bytes(LINES.encode())
    assert texts_of(open_source(tmp_path)) == TEXTS


def test_a_folder_without_a_file_that_is_read_names_what_is_there(tmp_path):
    write(tmp_path / "part-00000")
    with pytest.raises(DataError, match=r"no file that can be read; .*part-00000 \(no ending\)"):
        list_splits(SourceSpec(path=(str(tmp_path),)))


def test_files_that_are_not_read_are_named(tmp_path):
    write(tmp_path / "a.jsonl")
    for name in ("d.jsonl.partial", "e", "_old.jsonl", ".hidden.jsonl", "README.md"):
        write(tmp_path / name)
    inventory = open_source(tmp_path).inventory
    assert inventory.notes() == ["4 files: 1 read (1 train), 3 not read", "text in 1 of 1 sampled records"]
    (warning,) = inventory.warnings()
    here = tmp_path.name
    assert warning == (
        f"3 files not read: {here}/_old.jsonl (its name starts with an underscore), {here}/d.jsonl.partial (.partial), "
        f"{here}/e (no ending)"
    )
    for n in range(50):
        write(tmp_path / f"{n}.bak")
    assert "and 49 more" in open_source(tmp_path).inventory.warnings()[0]


def test_every_file_has_a_column_of_its_own(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*({"text": f"a {n}"} for n in range(120))))
    (tmp_path / "b.jsonl").write_bytes(jsonl({"content": "b 1", "n": 1}))
    source = open_source(tmp_path)
    assert texts_of(source)[-1] == "b 1"
    assert f"text from column 'content' in {tmp_path.name}/b.jsonl" in source.inventory.notes()
    (tmp_path / "c.jsonl").write_bytes(jsonl({"title": "x y", "body": "c 1"}))
    with pytest.raises(DataError, match=r"c.jsonl has several text columns \(title, body\); name one with"):
        open_source(tmp_path)
    (tmp_path / "c.jsonl").write_bytes(jsonl({"n": 1}))
    with pytest.raises(DataError, match=r"c.jsonl has no text column \(columns: n \(number\)\)"):
        open_source(tmp_path)
    (tmp_path / "c.jsonl").write_bytes(jsonl({"text": None}))
    assert "no text in its sample" in open_source(tmp_path).inventory.warnings()[0]
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "a.csv").write_text("id,text\n1,a b\n")
    (tmp_path / "csv" / "b.csv").write_text("content,id\nc d,1\n")
    assert texts_of(open_source(tmp_path / "csv")) == ["a b", "c d"]


def test_a_column_is_looked_for_after_the_first_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(*({"n": n} for n in range(3000)), {"text": "late"}))
    assert texts_of(open_source(path)) == ["late"]
    path.write_bytes(jsonl(*({"n": n} for n in range(3000)), {"body": "late"}))
    assert texts_of(open_source(path, text_column="body")) == ["late"]
    path.write_bytes(jsonl({"id": "doc_1"}))
    assert texts_of(open_source(path, text_column="id")) == ["doc_1"], "a column that is named is believed"


def test_parquet_shards_without_texts_are_empty(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet())
    (tmp_path / "b.parquet").write_bytes(parquet(text=pa.array([None, None], pa.null())))
    (tmp_path / "c.parquet").write_bytes(parquet(other=pa.array([], pa.int32())))
    (tmp_path / "d.parquet").write_bytes(parquet(text=TEXTS))
    source = open_source(tmp_path)
    assert texts_of(source) == TEXTS
    assert len(source.readers(Sharding(seed=1, num_lanes=None))) == 1
    assert "b.parquet (no text in its 2 rows)" in source.inventory.warnings()[0]


def test_files_beyond_the_sample_have_their_column_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(intake, "MAX_SAMPLED", 2)
    for n in range(5):
        (tmp_path / f"{n}.jsonl").write_bytes(jsonl({"content" if n == 1 else "text": f"file {n}"}))
    source = open_source(tmp_path)
    assert "text in 2 of 2 sampled records of 2 files; not every file was sampled" in source.inventory.notes()
    assert texts_of(source) == [f"file {n}" for n in range(5)]
    (tmp_path / "1.jsonl").write_bytes(jsonl({"n": 1}))
    with pytest.raises(DataError, match=r"1.jsonl has no text column"):
        texts_of(open_source(tmp_path))


def test_a_json_value_may_hold_brackets_and_be_large(tmp_path):
    texts = ['a { " [ \\ } b', "] , } ,}", "word " * 40_000, "end of it"]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": text} for text in texts], indent=2))
    assert texts_of(open_source(path)) == texts
    path.write_text(path.read_text().replace('"end of it"', "broken here"))
    bad = [record.problem for record in open_source(path).records() if record.problem]
    assert [problem.split(": ")[0] for problem in bad] == [f"{path}, JSON value 4"]


def test_json_values_take_memory_and_time_in_proportion_to_their_bytes():
    """Escapes, which a regular expression may keep a stack of; spaces, which it may try to match from each of them."""
    escapes, spaces = b'{"text": "' + b"a\\n" * 300_000 + b'"}', b'{"n": ' + b" " * 1_000_000 + b"1}"
    tracemalloc.start()
    (value,) = decompress.split_values(io.BytesIO(escapes))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert value == escapes
    assert peak < 8 * len(escapes)
    assert list(decompress.split_values(io.BytesIO(spaces))) == [spaces]


def test_examples_in_docstrings():
    for module in (columns, decompress, files):
        found = doctest.testmod(module)
        assert found.attempted
        assert not found.failed
