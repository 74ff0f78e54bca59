"""From rows of any source to prepared sets: columns, files, relevance judgements, the table of known sets."""

import csv
import gzip
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from calls import call
from datasets import Dataset, DatasetDict

from neobert.config.schema import Config
from neobert.config.schema_contrastive import PairSource
from neobert.config.schema_data import DatasetSection
from neobert.contrastive.examples import SETS, Example
from neobert.contrastive.prepare_sets import list_sets_of, name_source, prepare
from neobert.contrastive.reading import open_source
from neobert.contrastive.set_folder import BATCH_ROWS, PairStore, list_sets, write_set
from neobert.data.source.known_sets import KNOWN_SETS, choose_set
from neobert.errors import DataError

Contrastive = Callable[..., Config]


def read(source: PairSource, **arguments: Any) -> list[Example]:
    return list(open_source(source, **arguments).examples)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS: list[tuple[str, dict[str, Any], PairSource, list[Example]]] = [
    ("pairs", {"query": " a ", "positive": "b"}, PairSource(), [Example(anchor="a", positive="b")]),
    (
        "pairs",
        {"anchor": "a", "positive": ["b", "c", ""], "negative_1": "x", "negative_2": "", "negatives": ["y", "z"]},
        PairSource(),
        [Example(anchor="a", positive=p, negatives=("x", "y", "z")) for p in ("b", "c")],
    ),
    (
        "scored",
        {"sentence1": "a", "sentence2": "b", "score": "2.5", "label": 3},
        PairSource(),
        [Example(anchor="a", positive="b", score=2.5)],
    ),
    ("labelled", {"text": "a", "label": 3}, PairSource(), [Example(anchor="a", label="3")]),
    ("texts", {"text": "a", "id": 3}, PairSource(), [Example(anchor="a")]),
    (
        "pairs",
        {"Q": "a", "A": "b", "bad": "c", "other": "d"},
        PairSource(anchor_column="Q", positive_column="A", negative_columns="bad"),
        [Example(anchor="a", positive="b", negatives=("c",))],
    ),
    (
        "labelled",
        {"sentence1": "a", "sentence2": "b", "topic": "t"},
        PairSource(label_column="topic"),
        [Example(anchor="a", label="t")],
    ),
    ("pairs", {"anchor": "", "positive": "b"}, PairSource(), []),
]


@pytest.mark.parametrize(("form", "row", "source", "expected"), ROWS)
def test_columns(tmp_path: Path, form: str, row: dict[str, Any], source: PairSource, expected: list[Example]) -> None:
    file = write(tmp_path / "rows.jsonl", row)
    values = {name: getattr(source, name) for name in PairSource.__dataclass_fields__} | {"name": str(file)}
    opened = open_source(PairSource(**values))
    assert (opened.form, list(opened.examples)) == (form, expected)


def test_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    file = str(write(tmp_path / "rows.jsonl", {"left": "a", "right": "b"}))
    with pytest.raises(DataError, match=r"none of its columns \(left, right\) is called anchor, query"):
        open_source(PairSource(name=file))
    with pytest.raises(DataError, match=r"positive_column: 'wrong' is not there; its columns are left, right"):
        open_source(PairSource(name=file, anchor_column="left", positive_column="wrong"))


def test_two_texts_with_a_label_are_not_read_as_pairs_silently(tmp_path: Path) -> None:
    file = str(write(tmp_path / "rows.jsonl", {"sentence1": "a", "sentence2": "b", "label": 0}))
    with pytest.raises(
        DataError, match=r"write score_column: label .* or positive_column: sentence2 to take every row"
    ):
        open_source(PairSource(name=file))
    assert open_source(PairSource(name=file, score_column="label")).form == "scored"
    assert open_source(PairSource(name=file, positive_column="sentence2")).form == "pairs"
    assert open_source(PairSource(name=file, label_column="label")).form == "labelled"


def test_files_of_every_kind_give_the_same_examples(tmp_path: Path) -> None:
    rows = [{"anchor": f"a{n}", "positive": f"p{n}"} for n in range(3)]
    expected = [Example(anchor=f"a{n}", positive=f"p{n}") for n in range(3)]
    plain = write(tmp_path / "x.jsonl", *rows)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    for name, delimiter in (("x.csv", ","), ("x.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["anchor", "positive"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.jsonl.gz", "x.csv", "x.tsv", "x.parquet"):
        assert read(PairSource(name=str(tmp_path / name))) == expected, name
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    DatasetDict({"dev": Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "dict"))
    assert read(PairSource(name=str(tmp_path / "saved"))) == expected
    assert read(PairSource(name=str(tmp_path / "dict"), split="dev")) == expected
    with pytest.raises(DataError, match="has no split train; there: dev"):
        read(PairSource(name=str(tmp_path / "dict")))
    for name in ("x.jsonl", "saved"):
        with pytest.raises(DataError, match=f"{name} has no splits, so none is called dev; remove that"):
            read(PairSource(name=str(tmp_path / name), split="dev"))
    with pytest.raises(DataError, match=r"x\.jsonl is on the disk; config and revision belong to datasets of the hub"):
        read(PairSource(name=str(tmp_path / "x.jsonl"), config="pair"))


def test_a_folder_has_splits(tmp_path: Path) -> None:
    write(tmp_path / "f/train-0.jsonl", {"anchor": "a", "positive": "p"})
    write(tmp_path / "f/validation.jsonl", {"anchor": "b", "positive": "q"})
    assert [e.anchor for e in read(PairSource(name=str(tmp_path / "f")))] == ["a"]
    assert [e.anchor for e in read(PairSource(name=str(tmp_path / "f"), split="validation"))] == ["b"]
    with pytest.raises(DataError, match="f has no split test; there: train, validation"):
        read(PairSource(name=str(tmp_path / "f"), split="test"))


def test_files_are_looked_into_as_those_of_pretraining_are(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    write(folder / "en/a.jsonl", {"anchor": "a", "positive": "p"})
    write(folder / "testimonials.jsonl", {"query": "b", "answer": "q"})
    write(folder / "my-test.jsonl", {"anchor": "c", "positive": "r"})
    (folder / "list.json").write_text(json.dumps([{"anchor": "d", "positive": "s"}], indent=1))
    (folder / "notes.bak").write_text("x")
    opened = open_source(PairSource(name=str(folder)))
    assert [example.anchor for example in opened.examples] == ["a", "d", "b"]
    assert opened.found.warnings() == ["1 file not read: f/notes.bak (.bak)"]
    assert [e.anchor for e in read(PairSource(name=str(folder), split="test"))] == ["c"]
    (folder / "pointer.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    with pytest.raises(DataError, match=r"pointer.jsonl is a Git LFS pointer, not the file; `git lfs pull`"):
        read(PairSource(name=str(folder)))


BAD_RECORDS: dict[str, tuple[bytes, list[str]]] = {
    "torn.jsonl": (
        b'{"anchor": "a", "positive": "p"}\n{torn\n[1]\n{"anchor": "\\ud800", "positive": "p"}\n'
        b'{"anchor": "b", "positive": "' + b"x" * 300 + b'"}\n{"anchor": "c", "positive": "caf\xe9"}\n',
        [
            "2: Expecting property",
            "3: a JSON object was",
            "4: the text holds half",
            "5: the record has 332",
            "6: 'utf-8'",
        ],
    ),
    "stray.csv": (
        b'anchor,positive\na,p\n"x,stray\nb,q\nc,r,too many\nd\n',
        ["3: a quotation mark that is not closed", "5: 3 fields, and the header has 2", "6: 1 fields"],
    ),
    "stray.tsv": (b'anchor\tpositive\na\t"p\nb\tq\nc\n', ["4: 1 fields, and the header has 2"]),
    "semicolons.csv": (b"anchor;positive\na;p, q\nb\n", ["3: 1 fields, and the header has 2"]),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_records_are_named_counted_and_bounded(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in pretraining."""
    content, problems = BAD_RECORDS[name]
    file = tmp_path / name
    file.write_bytes(content)
    section = DatasetSection(max_bad_records=len(problems), max_record_bytes=200)
    examples = read(PairSource(name=str(file)), section=section)
    assert [example.anchor for example in examples] == (["a", "b"] if name.startswith("stray") else ["a"])
    for record, problem in zip(caplog.records, problems, strict=True):
        assert f"{file}:{problem}" in record.getMessage()
    with pytest.raises(DataError, match=rf"dataset.max_bad_records: {len(problems) - 1}, but {len(problems)} records"):
        read(PairSource(name=str(file)), section=replace(section, max_bad_records=len(problems) - 1))


def test_a_file_of_bad_records_only_is_an_error_of_that_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"query": "a", "answer": "b"})
    (tmp_path / "b.jsonl").write_bytes('{"query": "é", "answer": "b"}\n'.encode("latin-1") * 3)
    with pytest.raises(DataError, match=r"b.jsonl has no text: none of its 3 records .*b.jsonl:3: 'utf-8' codec"):
        read(PairSource(name=str(tmp_path)))


def test_a_record_that_is_read_and_is_too_deep_to_be_followed_is_a_bad_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "rows.jsonl", {"anchor": "a", "positive": "p"})
    with file.open("a") as rows:
        rows.write('{"anchor": "b", "positive": "q", "more": ' + "[" * 700 + "]" * 700 + "}\n")
    assert [e.anchor for e in read(PairSource(name=str(file)))] == ["a"]
    assert "rows.jsonl:2: nested too deeply to be read" in caplog.text


def test_bad_rows_of_libraries_are_counted_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"anchor": "a", "positive": ["p", "x" * 300]}, {"anchor": "b", "positive": ["q"]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    section = DatasetSection(max_record_bytes=200)
    for name, location in (("x.parquet", "x.parquet: row 1"), ("saved", "saved, row 1"), ("some/set", "hub, row 1")):
        caplog.clear()
        source = PairSource(name=name if "/" in name else str(tmp_path / name))
        examples = read(source, hub=lambda *arguments: rows, section=section)
        assert [example.anchor for example in examples] == ["b"]
        assert f"{location}: the record has 300 bytes, and dataset.max_record_bytes is 200" in caplog.text


def test_the_keys_of_bad_records_reach_the_preparation(contrastive: Contrastive, tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"anchor": "a", "positive": "p"}, {"anchor": "b", "positive": "x" * 99})
    values = (f"dataset.path={tmp_path / 'sets'}", f"dataset.name={file}", "dataset.max_record_bytes=80")
    assert prepare(contrastive(tmp_path / "run", *values))[0][0].num_rows == 1
    fresh = (*values, "dataset.max_bad_records=0", "dataset.force_redownload=true")
    with pytest.raises(DataError, match=r"dataset.max_bad_records: 0, but 1 records of .*x.jsonl:2: the record has"):
        prepare(contrastive(tmp_path / "run", *fresh))


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl is not there"):
        read(PairSource(name="nowhere.jsonl"))
    with pytest.raises(DataError, match=r"ALLNLY is neither a file, nor a hub dataset .*ALLNLI"):
        read(PairSource(name="ALLNLY"))


def test_judgements_join_queries_with_documents(tmp_path: Path) -> None:
    write(tmp_path / "b/queries.jsonl", {"_id": "q1", "text": "one"}, {"_id": "q2", "text": "two"})
    write(tmp_path / "b/corpus.jsonl", *({"_id": f"d{n}", "title": "t", "text": f"doc {n}"} for n in range(3)))
    (tmp_path / "b/qrels").mkdir()
    (tmp_path / "b/qrels/train.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq2\td1\t1\nq1\td0\t0\nq1\td2\t2\nq1\tgone\t1\n"
    )
    expected = [Example(anchor="two", positive="doc 1"), Example(anchor="one", positive="doc 2")]
    assert read(PairSource(name=str(tmp_path / "b"))) == expected


# ---- the table ----

HUB: dict[str, tuple[str | None, dict[str, Any], list[Example]]] = {
    "ALLNLI": (
        "triplet",
        {"anchor": "a", "positive": "p", "negative": "n"},
        [Example(anchor="a", positive="p", negatives=("n",))],
    ),
    "AMAZONQA": (None, {"query": "a", "pos": ["p", "q"]}, [Example(anchor="a", positive="p")]),
    "CONCURRENTQA": (
        None,
        {"question": "a", "pos_paras": [{"text": "p"}, {"text": "q"}], "neg_paras": [{"text": "n"}, {"text": "m"}]},
        [Example(anchor="a", positive="p", negatives=("n", "m"))],
    ),
    "GITHUBISSUE": ("positive", {"anchor": "a", "positive": "p"}, [Example(anchor="a", positive="p")]),
    "GOOAQ": (
        "triplet-5",
        {"question": "a", "answer": "p", **{f"negative_{n}": f"n{n}" for n in range(1, 6)}},
        [Example(anchor="a", positive="p", negatives=("n1", "n2", "n3", "n4", "n5"))],
    ),
    "PAQ": (None, {"set": ["a", "p"]}, [Example(anchor="a", positive="p")]),
    "PUBMEDQA": (
        "triplet-20",
        {"anchor": "a", "positive": "p", **{f"negative_{n}": f"n{n}" for n in range(1, 21)}},
        [Example(anchor="a", positive="p", negatives=tuple(f"n{n}" for n in range(1, 21)))],
    ),
    "QQP": (
        None,
        {"set": {"query": "a", "pos": ["p", "q"], "neg": ["n", "m"]}},
        [Example(anchor="a", positive="p", negatives=("n", "m"))],
    ),
    "SENTENCECOMP": (None, {"set": ["long text", "short"]}, [Example(anchor="short", positive="long text")]),
    "STACKEXCHANGE": (
        "body-body-pair",
        {"body1": "a", "body2": "p", "post1": "b", "post2": "q"},
        [Example(anchor="a", positive="p"), Example(anchor="b", positive="q")],
    ),
    "STACKOVERFLOW": (
        None,
        {"query": "a", "positive": ["p", "q"], "negative": ["n", "m"]},
        [Example(anchor="a", positive="p", negatives=("n", "m"))],
    ),
    "STS12": (None, {"sentence1": "a", "sentence2": "p", "score": 4.2}, [Example(anchor="a", positive="p")]),
    "STSBENCHMARK": (None, {"sentence1": "a", "sentence2": "p", "score": 4.0}, []),
    "TRIVIAQA": (
        "triplet",
        {"anchor": "a", "positive": "p", "negative": "n"},
        [Example(anchor="a", positive="p", negatives=("n",))],
    ),
    "WIKIHOW": (None, {"text": "a", "summary": "p"}, [Example(anchor="a", positive="p")]),
}
"""Key -> first configuration asked for, a row as the hub has it, and what becomes of it."""


@pytest.mark.parametrize("key", HUB)
def test_known_sets_map_their_rows(key: str) -> None:
    config, row, expected = HUB[key]
    asked = []

    def hub(name: str, config: str | None, split: str, revision: str | None) -> Iterable[dict[str, Any]]:
        asked.append((name, config, split, revision))
        return [row]

    assert read(PairSource(name=key, revision="r"), hub=hub) == expected
    assert asked[0] == (KNOWN_SETS[key], config, "train", "r")


@pytest.mark.parametrize("key", ["FEVER", "MSMARCO"])
def test_known_collections_are_joined(key: str) -> None:
    parts = {
        "default": [{"query-id": "q", "corpus-id": "d", "score": 1.0}],
        "queries": [{"_id": "q", "text": "a"}, {"_id": "r", "text": "b"}],
        "corpus": [{"_id": "d", "title": "", "text": "p"}],
    }
    rows = read(PairSource(name=key), hub=lambda name, config, split, revision: parts[config or ""])
    assert rows == [Example(anchor="a", positive="p")]


def test_there_are_seventeen_known_sets_and_three_ways_to_name_each() -> None:
    assert len(SETS) == 17
    assert set(HUB) | {"FEVER", "MSMARCO"} == set(SETS)
    assert list(SETS) == list(KNOWN_SETS)
    for key, hub_name in KNOWN_SETS.items():
        for name in (key, key.lower(), hub_name, hub_name.split("/")[1].upper()):
            assert choose_set(name) == key
    assert choose_set("sentence-transformers/other") is None


def test_columns_of_a_known_set_describe_the_dataset_itself() -> None:
    source = PairSource(name="STSBENCHMARK", split="validation", score_column="score")
    rows = [{"sentence1": "a", "sentence2": "b", "score": 1.0}]
    asked = []

    def hub(*arguments: Any) -> list[dict[str, Any]]:
        asked.append(arguments)
        return rows

    opened = open_source(source, hub)
    assert (opened.form, list(opened.examples)) == ("scored", [Example(anchor="a", positive="b", score=1.0)])
    assert asked == [("mteb/stsbenchmark-sts", None, "validation", None)]
    assert name_source(source).key == "STSBENCHMARK-validation"


# ---- prepared sets ----


def test_a_set_is_read_by_number(tmp_path: Path) -> None:
    many = [Example(anchor=f"a{n}", positive=f"p{n}", negatives=("n",) * (n % 3)) for n in range(BATCH_ROWS + 5)]
    info = write_set(tmp_path / "s", "s", "pairs", many, {"name": "x"})
    assert (info.num_rows, info.max_negatives) == (BATCH_ROWS + 5, 2)
    store = PairStore(tmp_path / "s")
    assert store.get(BATCH_ROWS + 4)["anchor"] == f"a{BATCH_ROWS + 4}"
    assert store.column("negatives", [1, 2]) == [["n"], ["n", "n"]]
    again = write_set(tmp_path / "t", "t", "pairs", many, {"name": "y"})
    assert again.fingerprint == info.fingerprint
    assert write_set(tmp_path / "t", "t", "pairs", many[1:], {}).fingerprint != info.fingerprint
    labels = [Example(anchor="a", label="x"), Example(anchor="b", label="y"), Example(anchor="c", label="x")]
    assert write_set(tmp_path / "l", "l", "labelled", labels, {}).labels == ("x", "y")
    assert PairStore(tmp_path / "l").column("label", [0, 1, 2]) == [0, 1, 0]
    with pytest.raises(DataError, match="t has no usable row"):
        write_set(tmp_path / "t", "t", "pairs", [], {})
    assert len(PairStore(tmp_path / "t")) == BATCH_ROWS + 4, "what was there stays"


def test_prepare_keeps_what_is_there_and_refreshes_what_changed(
    contrastive: Contrastive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write(tmp_path / "first.jsonl", {"anchor": "a", "positive": "p"})
    second = write(tmp_path / "second.jsonl", {"anchor": "b", "positive": "q"})
    path = f"dataset.path={tmp_path / 'sets'}"

    def run(*overrides: str) -> dict[str, bool]:
        done = prepare(contrastive(tmp_path / "run", path, f"dataset.name=[{first}, {second}]", *overrides))
        return {info.key: fresh for info, fresh in done}

    assert run() == {"first": True, "second": True}
    (tmp_path / "sets/all/second/set.json").unlink()  # As a kill in the middle leaves it.
    assert run() == {"first": False, "second": True}
    (tmp_path / "sets/all/second/notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"sets/all/second holds what is no set: .* move it"):
        run("dataset.force_redownload=true")
    (tmp_path / "sets/all/second/notes.txt").unlink()
    assert run("dataset.force_redownload=true", f"dataset.name={second}") == {"second": True}
    assert run("dataset.load_all_from_disk=true", "dataset.name=null") == {"first": False, "second": False}
    assert run(f"dataset.name={first.parent}/../{first.parent.name}/{first.name}") == {"first": False}, (
        "the file is the same"
    )
    more = f"contrastive.sets=[{{name: {first}, max_pairs: 1, anchor_prefix: x}}]"
    assert run("dataset.name=null", more) == {"first": True}, "the source is described differently"
    assert run("dataset.name=null", more.replace("x}", "y}")) == {"first": False}, "prefixes come later"
    manifest = json.loads((tmp_path / "sets/all/manifest.json").read_text())
    assert {key: entry["num_rows"] for key, entry in manifest["sets"].items()} == {"first": 1, "second": 1}
    assert set(list_sets(str(tmp_path / "sets"))) == {"first", "second"}


def test_all_names_and_collisions(contrastive: Contrastive, tmp_path: Path) -> None:
    for name in ("null", "ALL", "refinedweb"):
        assert [item.key for item in list_sets_of(contrastive(tmp_path, f"dataset.name={name}")).train] == list(SETS)
    write(tmp_path / "a/x.jsonl", {"anchor": "a", "positive": "p"})
    write(tmp_path / "b/x.jsonl", {"anchor": "a", "positive": "p"})
    twice = contrastive(tmp_path, f"dataset.name=[{tmp_path}/a/x.jsonl, {tmp_path}/b/../a/x.jsonl]")
    assert [item.key for item in list_sets_of(twice).all] == ["x"]
    config = contrastive(tmp_path, f"dataset.name=[{tmp_path}/a/x.jsonl, {tmp_path}/b/x.jsonl]")
    with pytest.raises(DataError, match="two sources would both be stored as x"):
        list_sets_of(config)


def test_the_script_says_what_to_type_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "mine.jsonl", {"anchor": "a", "positive": "p", "negative": "n"})
    config = tmp_path / "c.yaml"
    config.write_text(
        f"task: contrastive\ndataset: {{path: {tmp_path}/sets, name: {file}}}\ntrainer: {{max_steps: 1}}\n"
        "contrastive: {pretrained_checkpoint_dir: somewhere}\n"
    )
    assert call("contrastive/preprocess.py", str(config)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{file}: 1 file: 1 read (1 train)",
        f"{tmp_path}/sets/all/mine: 1 pairs, up to 1 negatives (written)",
        "train on it with:",
        f"neobert finetune {config}",
    ]
    file.unlink()
    assert call("contrastive/preprocess.py", str(config), "--dataset.force_redownload") == 2
    assert "mine.jsonl is not there" in capsys.readouterr().err
