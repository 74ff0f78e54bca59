import doctest

import pytest
from datasets import load_dataset

from neobert.data.source import sharing, splits
from neobert.data.source.splits import (
    check_split,
    choose_eval_split,
    choose_train_split,
    find_split,
    parse_split,
    slice_bounds,
)
from neobert.errors import DataError


@pytest.mark.parametrize(
    ("names", "train", "chosen"),
    [
        (["train", "test", "validation"], "train", "validation"),
        (["train", "dev", "test"], "train", "test"),
        (["train", "dev"], "train", "dev"),
        (["train", "eval"], "train", "eval"),
        (["train"], "train", None),
        (["validation"], "validation", None),
        (["validation", "test"], "validation", "test"),
    ],
)
def test_choose_eval_split(names, train, chosen):
    assert choose_eval_split(names, train) == chosen


def test_choose_train_split():
    assert choose_train_split(["validation", "train"], None) == "train"
    assert choose_train_split(["all"], None) == "all"
    assert choose_train_split(["a", "b"], "b") == "b"
    with pytest.raises(DataError, match=r"no split named train; set dataset.train_split to one of validation, test"):
        choose_train_split(["validation", "test"], None)
    with pytest.raises(DataError, match=r"dataset.train_split: 'c' is not there; splits found: a, b"):
        choose_train_split(["a", "b"], "c")
    assert choose_train_split(["train"], "train[:1%]") == "train[:1%]"
    with pytest.raises(DataError, match=r"dataset.train_split: 'c\[:1%\]' is not there; splits found: train"):
        choose_train_split(["train"], "c[:1%]")
    with pytest.raises(DataError, match=r"dataset.eval_split: 'x'"):
        check_split(["train"], "x", "dataset.eval_split")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00016.jsonl.gz", "train"),
        ("validation.jsonl", "validation"),
        ("Test_1.json", "test"),
        ("dev.jsonl", "dev"),
        ("eval-a.parquet", "eval"),
        ("part-1.jsonl", None),
    ],
)
def test_find_split(name, split):
    assert find_split([name])[0] == (split or "train")


@pytest.mark.parametrize(
    ("words", "size", "bounds"),
    [
        ("train", None, (0, None)),
        ("train[:]", None, (0, None)),
        ("train[:1000]", None, (0, 1000)),
        ("train[1_000:]", None, (1000, None)),
        ("train[10:20]", 100, (10, 20)),
        ("train[:1%]", 1000, (0, 10)),
        ("train[10%:20%]", 1000, (100, 200)),
        ("train[99%:]", 1000, (990, None)),
        ("train[-10%:]", 1000, (900, None)),
        ("train[:-5]", 1000, (0, 995)),
        ("train[-100:-50]", 1000, (900, 950)),
        ("train[5:10%]", 1000, (5, 100)),
        ("validation.clean[:50%]", 3, (0, 2)),
        ("train[:100]", 100, (0, 100)),
    ],
)
def test_slices(words, size, bounds):
    split = parse_split(words)
    assert slice_bounds(split, size) == bounds
    assert parse_split(str(split)) == split


@pytest.mark.parametrize("size", [7, 100, 999])
@pytest.mark.parametrize("cut", ["[:33%]", "[33%:67%]", "[67%:]", "[-21%:]", "[3:-2]", "[:50%]", "[5:]"])
def test_slices_hold_what_datasets_puts_in_them(tmp_path, size, cut):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(size)))
    theirs = load_dataset("json", data_files=str(folder / "a.jsonl"), split=f"train{cut}", cache_dir=str(tmp_path))
    begin, end = slice_bounds(parse_split(f"train{cut}"), size)
    assert theirs["n"][:] == list(range(size))[begin:end]


@pytest.mark.parametrize(
    ("words", "size", "message"),
    [
        ("train[:1%]", None, r"train\[:1%\]: the number of documents of split 'train' is not known .*streaming: false"),
        ("train[-5:]", None, r"give absolute numbers \(train\[:1000\]\), or set dataset.streaming: false"),
        ("train[:200]", 100, r"train\[:200\]: 200 is outside of split 'train', which has 100 documents"),
        ("train[-101:]", 100, r"-101 is outside of split 'train', which has 100 documents"),
        ("train[20:10]", None, r"train\[20:10\] holds none of the documents"),
        ("train[20:20]", 100, r"train\[20:20\] holds none of its 100 documents"),
        ("train[100:]", 100, r"train\[100:\] holds none of its 100 documents"),
        ("train[:0]", None, r"train\[:0\] holds none"),
        ("train[:1%]", 20, r"train\[:1%\] holds none of its 20 documents"),
    ],
)
def test_slices_that_cannot_be(words, size, message):
    with pytest.raises(DataError, match=message):
        slice_bounds(parse_split(words), size)


@pytest.mark.parametrize("words", ["train[", "train[5]", "train[a:b]", "train[:1.5%]", "[5:]", "", "train[:5][2:]"])
def test_slices_written_wrongly(words):
    with pytest.raises(DataError, match=r"is not a split or a slice; write for example train, train\[:10%\]"):
        parse_split(words)
    with pytest.raises(DataError, match=r"120% is more than everything"):
        parse_split("train[:120%]")


def test_the_training_split_is_never_chosen_to_evaluate():
    assert choose_eval_split(["validation", "test"], "validation[:50%]") == "test"
    assert choose_eval_split(["validation"], "validation[:50%]") is None


def test_examples_in_docstrings():
    for module in (splits, sharing):
        found = doctest.testmod(module)
        assert found.attempted
        assert not found.failed
