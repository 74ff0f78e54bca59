"""Which split is trained on and which one evaluates. Slices (`train[:1%]`) are refused here until they are built."""

from collections.abc import Sequence

from neobert.data.errors import DataError

EVAL_SPLITS = ("validation", "eval", "test", "dev")
"""Looked for in this order when `dataset.eval_split` is null."""

SPLIT_PREFIXES = ("train", *EVAL_SPLITS)
"""A file or folder whose name begins with one of these belongs to that split."""


def choose_eval_split(names: Sequence[str], train_split: str) -> str | None:
    """The split to evaluate on when none is named; never the training split.

    >>> choose_eval_split(["train", "test", "validation"], "train")
    'validation'
    """
    for name in EVAL_SPLITS:
        if name in names and name != train_split:
            return name
    return None


def choose_train_split(names: Sequence[str], wanted: str | None) -> str:
    """The split to train on: the wanted one, else `train`, else the only one there is.

    Raises:
        DataError: it is not there.
    """
    if wanted is not None:
        check_split(names, wanted, "dataset.train_split")
        return wanted
    if "train" in names:
        return "train"
    if len(names) == 1 and names[0] not in EVAL_SPLITS:
        return names[0]
    raise DataError(f"there is no split named train; set dataset.train_split to one of {', '.join(names)}")


def check_split(names: Sequence[str], wanted: str, field: str) -> None:
    """Raises when `wanted` is not among the splits.

    Raises:
        DataError: with the names there are.
    """
    if "[" in wanted:
        raise DataError(f"{field}: {wanted!r}: slices of splits are not supported yet; name a whole split")
    if wanted not in names:
        raise DataError(f"{field}: {wanted!r} is not there; splits found: {', '.join(names)}")


def split_of_name(name: str) -> str | None:
    """The split that a file or folder name stands for, None when it names none.

    >>> split_of_name("validation-00000-of-00001.jsonl.gz")
    'validation'
    """
    return next((prefix for prefix in SPLIT_PREFIXES if name.lower().startswith(prefix)), None)
