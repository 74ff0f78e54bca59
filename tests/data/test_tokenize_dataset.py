"""The command tokenize_dataset.py: every flag, every error before any work, and parts on several machines."""

import json
import os
import subprocess
import sys

import pytest
from calls import call
from datasets import Dataset, load_from_disk

from neobert.data.store.arrow import read_manifest
from neobert.data.store.tokens import TokenStore


@pytest.fixture
def saved_tokenizer(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "words")
    return tmp_path / "words"


@pytest.fixture
def start(tmp_path, corpora, saved_tokenizer, monkeypatch, capsys):
    """Runs the command on the small corpus; gives its exit code, what it printed and what it complained of."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "2")

    def run(*flags, dataset=corpora["text_indexed"], output=tmp_path / "out"):
        words = ["--tokenizer", str(saved_tokenizer), "--output", str(output), *flags]
        code = call("pretraining/tokenize_dataset.py", *(["--dataset", str(dataset)] if dataset else []), *words)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def encode(tokenizer, texts):
    return [tokens.tolist() for tokens in tokenizer.encode_batch(texts)]


def test_the_default_is_one_row_a_document_with_special_tokens(tmp_path, start, tokenizer, texts):
    code, out, _ = start()
    assert code == 0
    rows = load_from_disk(str(tmp_path / "out"))
    assert rows.column_names == ["input_ids"]
    assert rows["input_ids"][:] == [[tokenizer.cls_id, *ids, tokenizer.sep_id] for ids in encode(tokenizer, texts)]
    assert "150 documents in 150 rows" in out
    assert out.splitlines()[-1] == (f"train on it with: --dataset.path {tmp_path / 'out'} --dataset.streaming false")
    manifest = read_manifest(tmp_path / "out")
    assert (manifest["source_label"], manifest["tokenizer_name"], manifest["special_tokens"]) == (
        "text_indexed",
        "words",
        True,
    )
    assert str(tmp_path) not in json.dumps(manifest)
    assert start()[0] == 0, "complete: nothing to do"


def test_the_flags_that_shape_rows(tmp_path, start, tokenizer, texts):
    flags = ("--max-length", "10", "--max-samples", "20", "--return-special-tokens-mask", "--num-proc", "1")
    assert start(*flags)[0] == 0
    assert os.environ["RAYON_NUM_THREADS"] == "1"
    rows = load_from_disk(str(tmp_path / "out"))
    assert rows.column_names == ["input_ids", "special_tokens_mask", "document"]
    pieces = [ids[i : i + 8] for ids in encode(tokenizer, texts[:20]) for i in range(0, len(ids), 8)]
    assert rows["input_ids"][:] == [[tokenizer.cls_id, *ids, tokenizer.sep_id] for ids in pieces]
    assert rows["special_tokens_mask"][:] == [[1, *[0] * len(ids), 1] for ids in pieces]
    assert sorted(set(rows["document"][:])) == list(range(20))
    assert start("--no-special-tokens", output=tmp_path / "bare")[0] == 0
    assert load_from_disk(str(tmp_path / "bare"))["input_ids"][:] == encode(tokenizer, texts)


def test_split_and_column(tmp_path, start, tokenizer):
    folder = tmp_path / "files"
    folder.mkdir()
    for split, word in (("train", "w1"), ("test", "w2")):
        (folder / f"{split}.jsonl").write_text(json.dumps({"a": word, "b": "w3"}) + "\n")
    assert start("--split", "test", "--text-column", "b", dataset=folder)[0] == 0
    assert TokenStore(tmp_path / "out", tokenizer).content(0).tolist() == encode(tokenizer, ["w3"])[0]
    code, _, err = start("--split", "dev", "--text-column", "b", dataset=folder, output=tmp_path / "x")
    assert code == 2
    assert "'dev' is not there; splits found: test, train" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-length", "2"), "--max-length: 2 is too small; give at least 3"),
        (("--max-length", "0", "--no-special-tokens"), "--max-length: 0 is too small; give at least 1"),
        (("--num-proc", "0"), "--num-proc: 0 is too small; give at least 1"),
        (("--max-samples", "0"), "--max-samples: 0 is too small; give at least 1"),
        (("--no-special-tokens", "--return-special-tokens-mask"), "marks what --no-special-tokens leaves out"),
        (("--shard", "1/2", "--max-samples", "3"), "it cannot be cut with --shard"),
        (("--text-column", "body"), "dataset.text_column: 'body' is not in"),
        (("--tokenizer", "/nowhere/at/all"), "/nowhere/at/all is no folder with a tokenizer"),
        (("--dataset", "/nowhere/data"), "/nowhere/data does not exist"),
    ],
)
def test_errors_come_before_any_work(tmp_path, start, flags, message):
    code, _, err = start(*flags)
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".tmp-out").exists()


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b"])
def test_a_shard_is_written_i_of_n(shard, start):
    code, _, err = start("--shard", shard)
    assert code == 2
    assert "write i/n with i from 1 to n, for example 1/8" in err


def test_other_settings_do_not_replace_a_folder(tmp_path, start, corpora):
    assert start()[0] == 0
    code, _, err = start("--no-special-tokens")
    assert code == 2
    assert "holds other data (special_tokens is True there and False here); choose another folder" in err
    code, _, err = start(dataset=corpora["indexed"], output=tmp_path / "again")
    assert code == 2
    assert "is tokenised already" in err


def test_without_a_dataset_there_must_be_a_report(start):
    code, _, err = start(dataset=None)
    assert code == 2
    assert "--dataset is missing" in err


def test_parts_and_their_report(tmp_path, start, tokenizer, texts):
    code, out, _ = start("--shard", "2/2", "--report")
    assert code == 0
    assert "the machine that finishes last joins them" in out
    code, out, _ = start("--shard", "1/2", "--report")
    assert code == 0
    assert "150 documents in 150 rows" in out
    assert (tmp_path / "out" / "report.svg").is_file()
    store = TokenStore(tmp_path / "out", tokenizer)
    assert [store.content(n).tolist() for n in range(len(store))] == encode(tokenizer, texts)
    code, _, err = start("--shard", "1/3")
    assert code == 2
    assert "--shard is set for 3 parts" in err


def test_report_of_a_folder_that_is_there(tmp_path, start):
    code, _, err = start("--report", dataset=None)
    assert code == 2
    assert "out holds no tokenised data to report on" in err
    start()
    code, out, _ = start("--report", dataset=None)
    assert code == 0
    assert "150 documents" in out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["num_documents"] == 150


@pytest.mark.parametrize("kind", ["text_indexed", "jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize(("split", "begin", "end"), [("train[:10%]", 0, 15), ("train[20:-100]", 20, 50)])
def test_slices_of_every_kind(tmp_path, start, corpora, tokenizer, texts, kind, split, begin, end):
    assert start("--split", split, "--no-special-tokens", dataset=corpora[kind])[0] == 0
    assert load_from_disk(str(tmp_path / "out"))["input_ids"][:] == encode(tokenizer, texts[begin:end])
    code, _, err = start("--split", split, "--shard", "1/2", dataset=corpora[kind], output=tmp_path / "parts")
    assert code == 2
    assert f"--split: {split} is a slice; drop one of them" in err


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_parts_of_every_kind(tmp_path, start, corpora, tokenizer, texts, kind):
    for number in (2, 1, 3):
        assert start("--shard", f"{number}/3", "--no-special-tokens", dataset=corpora[kind])[0] == 0
    assert load_from_disk(str(tmp_path / "out"))["input_ids"][:] == encode(tokenizer, texts)


def test_threads_that_tokenise():
    """The pool of the tokenizer has as many threads as were asked for."""
    code = (
        "import os, tokenizers\n"
        "from neobert.data.tokenizer import limit_threads\n"
        "limit_threads(3)\n"
        "backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0}, unk_token='a'))\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "backend.encode_batch(['a'] * 64)\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3"]


def test_a_text_folder_and_lines_of_json_give_the_same_tokens(tmp_path, start, texts, tokenizer):
    Dataset.from_dict({"content": texts}).save_to_disk(tmp_path / "text")
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    assert start(dataset=tmp_path / "text", output=tmp_path / "a")[0] == 0
    assert start(dataset=tmp_path / "lines.jsonl", output=tmp_path / "b")[0] == 0
    name = "data-00000.arrow"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
