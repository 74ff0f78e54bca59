"""CSV and TSV whose quotation marks, delimiters and fields are not as they should be: a fault costs one line."""

import csv
import gzip
import json
import random

import pytest

from neobert.config.schema_data import DatasetSection
from neobert.data.source.files import local_file
from neobert.data.source.formats import list_splits
from neobert.data.source.spec import describe_sources
from neobert.data.source.text import Sharding, Span
from neobert.errors import DataError

ROWS = "".join(f"{n},row {n}\n" for n in range(3, 30))
MANY = [f"row {n}" for n in range(3, 30)]
NOT_CLOSED = "a quotation mark that is not closed"


def open_source(path, **values):
    return list_splits(*describe_sources(DatasetSection(path=str(path), **values)))["train"](None)


# name of the file, content, the texts, and line: start of each problem
QUOTES = {
    "a field of TSV starts with one": ("a.tsv", 'id\ttext\n1\ta\n2\t"b\n3\tc\n', ["a", '"b', "c"], []),
    "it closes rows later": ("a.tsv", 'id\ttext\n1\t"a\n2\tb\n3\tc"\n4\td\n', ['"a', "b", 'c"', "d"], []),
    "in a field of TSV": ("a.tsv", 'id\ttext\n1\t5" wide\n2\t"5" wide\n', ['5" wide', '"5" wide'], []),
    "TSV that was quoted on purpose": (
        "a.tsv",
        'id\ttext\n1\t"a ""b"""\n2\t"c\nd"\n3\t"e\tf"\n4\t"g ""h""\ti\n5\tj"\n',
        ['a "b"', "c\nd", "e\tf", 'g "h"\ti\n5\tj'],
        [],
    ),
    "TSV whose text comes first": ("a.tsv", 'text\tid\n"a\nb"\t1\nc\t2\n', ["a\nb", "c"], []),
    "doubled in rows between two in TSV": (
        "a.tsv",
        'id\ttext\n1\t"a\n2\tb ""b\n3\tc\n4\t""d\n5\te"\n6\tf\n',
        ['"a', 'b ""b', "c", '""d', 'e"', "f"],
        [],
    ),
    "one column of TSV": ("a.tsv", 'text\na\n"b\nc\n"d"\n', ["a", '"b', "c", "d"], []),
    "to the end of the file": ("a.csv", 'id,text\n1,a\n2,"b\n3,c\n4,d\n', ["a", "c", "d"], [f"3: {NOT_CLOSED} (unex"]),
    "to the next quote": ("a.csv", 'id,text\n1,"a\n2,b\n3,"c,d"\n', ["b", "c,d"], [f"2: {NOT_CLOSED} (',' expected"]),
    "twice": ("a.csv", 'id,text\n1,"a\n2,b\n3,"c\n4,d\n', ["b", "d"], [f"2: {NOT_CLOSED}", f"4: {NOT_CLOSED}"]),
    "inside of quotes": ("a.csv", 'id,text\n1,"a "b" c"\n2,d\n', ["d"], ["2: ',' expected after"]),
    "closed after many rows": (
        "a.csv",
        f'id,text\n2,"b\n{ROWS}30,c"\n31,d\n',
        [*MANY, 'c"', "d"],
        ["2: a quoted field spans 29 lines that are rows themselves"],
    ),
    "many lines on purpose": (
        "a.csv",
        'id,text\n1,"' + "a line, of, prose\n" * 40 + '"\n2,"""b"", he said\n' + "3,c\n" * 20 + '"\n4,d\n',
        ["a line, of, prose\n" * 40, '"b", he said\n' + "3,c\n" * 20, "d"],
        [],
    ),
    "with another number of fields": (
        "a.csv",
        'id,text,n\n1,"a,0\n2,b,0\n3,c",0,0\n4,d,0\n',
        ["b", "d"],
        ["2: a quoted field spans 3 lines", "4: 4 fields, and the header has 3"],
    ),
}

FIELDS = {
    "too many": ("a.csv", "id,text\n1,a,b\n2,c\n", ["c"], ["2: 3 fields, and the header has 2"]),
    "too few": ("a.csv", "id,text\n1\n2,c\n", ["c"], ["2: 1 fields, and the header has 2"]),
    "too many, over lines": (
        "a.csv",
        'id,text,body\n1,a,b,"c\nd\ne"\n2,f,g\n',
        ["f"],
        ["2: 4 fields, and the header has 3"],
    ),
    "a delimiter at the end of every row": ("a.csv", "id,text\n1,a,\n2,b,\n", ["a", "b"], []),
    "too many, of TSV": ("a.tsv", "id\ttext\n1\ta\tb\n2\tc\n", ["c"], ["2: 3 fields, and the header has 2"]),
}

DELIMITERS = {
    "semicolons": ("a.csv", 'id;text\n1;a, b\n2;"c;d"\n3;"e\nf"\n', ["a, b", "c;d", "e\nf"], []),
    "tabs": ("a.csv", 'id\ttext\n1\ta, b\n2\t"c\n', ["a, b", '"c'], []),
    "bars": ("a.csv", "id|text\n1|a, b; c\n2|d\n", ["a, b; c", "d"], []),
    "commas": ("a.tsv", 'id,text\n1,"a,b"\n2,c\n', ["a,b", "c"], []),
    "semicolons between quoted names": ("a.csv", '"id";"text"\n"1";"a, b"\n', ["a, b"], []),
    "semicolons named by a line before": ("a.csv", "sep=;\nid;text\n1;a\n2;b;c\n", ["a"], ["4: 3 fields"]),
    "semicolons, compressed": ("a.csv.gz", "id;text\n1;a, b\n2;c\n", ["a, b", "c"], []),
    "semicolons in the name of a tab-separated column": ("a.tsv", "id;n\ttext\n1\ta;b\n", ["a;b"], []),
}


@pytest.mark.parametrize(
    "case", [*QUOTES.values(), *FIELDS.values(), *DELIMITERS.values()], ids=[*QUOTES, *FIELDS, *DELIMITERS]
)
def test_what_a_row_is(case, tmp_path):
    name, content, texts, problems = case
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    records = list(open_source(path, text_column="text").records())
    assert [record.text for record in records if record.text is not None] == texts
    found = [record.problem for record in records if record.problem is not None]
    assert len(found) == len(problems)
    assert all(there.startswith(f"{path}:{here}") for there, here in zip(found, problems))


@pytest.mark.parametrize("word", ["semicolons", "tabs", "bars", "commas"])
def test_another_delimiter_is_named(word, tmp_path):
    name, content, _, _ = DELIMITERS[word]
    (tmp_path / name).write_text(content)
    source = open_source(tmp_path)
    assert source.notes == [
        "text from column 'text'",
        f"{word} between the columns of {tmp_path / name}, as the header has them",
    ]


def test_delimiters_are_those_of_each_file(tmp_path):
    for number, delimiter in enumerate(",;\t|"):
        (tmp_path / f"{number}.csv").write_text(f"id{delimiter}text\n1{delimiter}text {number}\n")
    source = open_source(tmp_path)
    assert [record.text for record in source.records()] == [f"text {number}" for number in range(4)]
    assert len(source.notes) == 4


def test_a_header_of_one_cell_with_separators_is_no_column(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question;answer\nwhat is it?\nnothing\n")
    with pytest.raises(DataError, match=r"the header is one cell, 'question;answer', and its rows .*dataset.text_col"):
        open_source(path)
    source = open_source(path, text_column="question;answer")
    assert [record.text for record in source.records()] == ["what is it?", "nothing"]


def test_a_column_of_the_header_is_believed(tmp_path):
    (tmp_path / "0.csv").write_text("id,text\n")
    (tmp_path / "1.csv").write_text("id,text\n" + "1,\n" * 200 + "2,late\n")
    assert [record.text for record in open_source(tmp_path).records() if record.text] == ["late"]
    path = tmp_path / "b.csv"
    path.write_text("content,body\n1,words\n")
    assert [record.text for record in open_source(path).records()] == ["words"], "a number is no text"
    path.write_text("id,text\n")
    with pytest.raises(DataError, match="has no text: no file of it has a row that can be read"):
        open_source(path)


def test_a_first_file_without_a_row_that_fits_is_a_bad_shard(tmp_path):
    (tmp_path / "0.csv").write_text("id,text\n1,a,b\n2,c,d\n")
    (tmp_path / "1.csv").write_text("id,text\n1,e\n")
    with pytest.raises(DataError, match=r"no row of .*0.csv can be read"):
        open_source(tmp_path)
    source = open_source(tmp_path, on_bad_shard="skip")
    assert [record.text for record in source.records()] == ["e"]
    assert "1 file not read" in source.inventory.warnings()[0]


def test_rows_that_never_fit_their_header_are_the_error(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,a,b\n2,c,d\n")
    with pytest.raises(DataError, match=r"no row of .* can be read with its header \(id, text\).*a.csv:2: 3 fields"):
        open_source(path)


def test_many_lost_lines_are_an_error(tmp_path, make_config, make_data):
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + "1,w1 w1 w1 w1 w1 w1\n" * 50 + '1,"stray w1 w1\n' * 20)
    lane = make_data(make_config(path=str(path), num_lanes=1, max_bad_records=20)).train.lane_opener()(0)
    state = lane.start()
    while state["epoch"] == 0:
        state = lane.open(state).next_state
    assert state["stream"]["bad"] == 20
    loader = make_data(make_config(path=str(path), num_lanes=1, window_documents=100, max_bad_records=19)).loader()
    with pytest.raises(DataError, match=r"dataset.max_bad_records: 19, but 20 records .*a.csv:71: a quotation mark"):
        next(loader)


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(n, marks=pytest.mark.full) for n in range(20, 1000))])
def test_what_the_csv_module_writes_is_read_as_it_was(seed, tmp_path):
    """Texts of quotation marks, delimiters and line ends, in files of one to four columns."""
    draw = random.Random(seed)
    parts = ["word", "a, b", 'said "hi"', "\n", "\r\n", ";", "\t", "|", " ", "é", '"', "''", "42", "\n\n", ",,"]
    columns = draw.sample(["text", "id", "b", "c"], k=draw.randint(2, 4))
    columns[0] = "text" if "text" not in columns else columns[0]
    rows = [{name: str(draw.randrange(99)) for name in columns} for _ in range(30)]
    for row in rows:
        row["text"] = "".join(draw.choices(parts, k=draw.randint(1, 40)))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        ends = draw.choice(["\n", "\r\n"])
        writer = csv.DictWriter(file, columns, delimiter=draw.choice(",;|"), lineterminator=ends)
        writer.writeheader()
        writer.writerows(rows)
    records = list(open_source(tmp_path, text_column="text").records())
    assert [record.text for record in records] == [row["text"] if row["text"].strip() else None for row in rows]
    assert not any(record.problem for record in records)


def write_damaged(path, draw, delimiter):
    """A file with stray quotation marks, rows of other sizes, quoted rows over lines, blank lines."""
    rows = [f"id{delimiter}text\n"]
    for number in range(60):
        kind = draw.randrange(8)
        text = f"text {number}"
        if kind == 0:
            text = f'"{text}'
        elif kind == 1:
            text = f'"{text}\nmore{delimiter} of ""{number}"""'
        elif kind == 2:
            text = f'"{text}\nmore"'
        elif kind == 3:
            text = f"{text}{delimiter}x"
        elif kind == 4:
            text = f'{text}"'
        rows.append(f"{number}{delimiter}{text}\n" if kind != 5 else "\n")
    content = "".join(rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(n, marks=pytest.mark.full) for n in range(6, 300))])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz"])
def test_reading_is_a_function_of_the_position_alone(name, seed, tmp_path):
    """From any cursor, by windows of any size, with what was read ahead put back or not: the same records."""
    draw = random.Random(seed)
    write_damaged(tmp_path / name, draw, "\t" if "tsv" in name else ",")
    source = open_source(tmp_path, text_column="text")
    records = list(source.records())
    assert len(records) > 20
    for index in draw.sample(range(len(records)), 6):
        after = json.loads(json.dumps(records[index].cursor))
        assert list(source.records(Span(after=after))) == records[index + 1 :]
        assert source.cursor_after(index + 1) == records[index].cursor
    (reader,) = source.readers(Sharding(seed=1, num_lanes=1))
    expected, cursor, found = list(reader.read(0, reader.start())), reader.start(), []
    while len(found) < len(expected):
        window = reader.read(0, cursor)
        found += [record for record, _ in zip(window, range(draw.randint(1, 5)))]
        window.close()
        cursor = found[-1].cursor
    assert found == expected


def test_lines_that_were_read_ahead_are_read_again_from_memory(tmp_path, monkeypatch):
    """A compressed file is not unfolded again for every stray quotation mark."""
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"id,text\n1,good\n" + b'2,"stray\n' * 50))
    file, opened = local_file(path), []
    whole = type(file).open
    monkeypatch.setattr(type(file), "open", lambda self: opened.append(self.url) or whole(self))
    source = open_source(path, text_column="text")
    opened.clear()
    assert sum(record.problem is not None for record in source.records()) == 50
    assert len(opened) == 1
