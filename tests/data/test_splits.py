import pytest

from neobert.data.errors import DataError
from neobert.data.splits import check_split, choose_eval_split, choose_train_split, split_of_name


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
def test_split_of_name(name, split):
    assert split_of_name(name) == split
