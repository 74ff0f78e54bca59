"""Which split is trained on and which one evaluates, and slices of them: `train[:10%]`, `train[1000:]`.

The syntax of slices is that of `datasets`: bounds are numbers of documents or whole percents, negative ones count from
the end, and an open end is left out.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from neobert.errors import DataError

EVAL_SPLITS = ("validation", "eval", "test", "dev")
"""Looked for in this order when `dataset.eval_split` is null."""

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "eval": "eval",
    "evaluation": "eval",
    "test": "test",
    "testing": "test",
    "dev": "dev",
}
"""Whole words of a file or folder name, and the split that it then belongs to."""

_LETTER = r"[^\W\d_]"
_SPLIT_WORD = re.compile(rf"(?<!{_LETTER})({'|'.join(SPLIT_WORDS)})(?!{_LETTER})", re.IGNORECASE)

_BOUND = r"-?\d[\d_]*%?"
_SPLIT = re.compile(rf"(?P<name>[^\[\]]+)(?:\[(?P<begin>{_BOUND})?:(?P<end>{_BOUND})?\])?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """One end of a slice; negative values count from the end of the split."""

    value: int
    percent: bool = False

    def __str__(self) -> str:
        return f"{self.value}%" if self.percent else str(self.value)


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitSlice:
    """A split, or a stretch of one."""

    name: str
    begin: Bound | None = None
    end: Bound | None = None

    @property
    def is_whole(self) -> bool:
        return self.begin is None and self.end is None

    @property
    def needs_size(self) -> bool:
        """Whether it cannot be resolved without the number of documents of the split."""
        return any(bound is not None and (bound.percent or bound.value < 0) for bound in (self.begin, self.end))

    @property
    def folder_name(self) -> str:
        """A name for a folder with these documents; a slice and its split have two.

        >>> parse_split("train[10%:-500]").folder_name
        'train_10p_m500'
        """
        if self.is_whole:
            return self.name
        ends = ["" if bound is None else str(bound) for bound in (self.begin, self.end)]
        return "_".join([self.name, *(end.replace("%", "p").replace("-", "m") for end in ends)])

    def __str__(self) -> str:
        if self.is_whole:
            return self.name
        return f"{self.name}[{'' if self.begin is None else self.begin}:{'' if self.end is None else self.end}]"


def parse_split(text: str) -> SplitSlice:
    """A split as it is written in `dataset.train_split`.

    >>> str(parse_split("train[10%:-500]"))
    'train[10%:-500]'

    Raises:
        DataError: it is not written like a split.
    """
    found = _SPLIT.fullmatch(text.strip())
    if found is None:
        raise DataError(
            f"{text!r} is not a split or a slice; write for example train, train[:10%], train[1000:] or train[-500:]"
        )
    return SplitSlice(
        name=found["name"].strip(), begin=_parse_bound(found["begin"], text), end=_parse_bound(found["end"], text)
    )


def slice_bounds(split: SplitSlice, num_documents: int | None) -> tuple[int, int | None]:
    """First document of a slice, and the one after its last; None for an open end.

    Percents are rounded to the nearest document, as `datasets` does.

    >>> slice_bounds(parse_split("train[10%:-5]"), 200)
    (20, 195)

    Args:
        num_documents: documents of the split; None when unknown, then percents and negative numbers cannot be resolved.

    Raises:
        DataError: the size is needed and unknown, or the slice is empty or reaches beyond the split.
    """
    if num_documents is None and split.needs_size:
        raise DataError(
            f"{split}: the number of documents of split {split.name!r} is not known while it is streamed, and percents "
            "and negative numbers count from it; give absolute numbers (train[:1000]), or set dataset.streaming: false"
        )
    begin = 0 if split.begin is None else _resolve_bound(split.begin, split, num_documents)
    end = None if split.end is None else _resolve_bound(split.end, split, num_documents)
    if begin == (num_documents if end is None else end) or (end is not None and begin > end):
        size = "" if num_documents is None else f" of its {num_documents} documents"
        raise DataError(f"{split} holds none{size or ' of the documents'}; widen it")
    return begin, end


def overlap(one: SplitSlice, other: SplitSlice, num_documents: int | None) -> bool:
    """Whether two slices have a document in common.

    >>> overlap(parse_split("train[:100]"), parse_split("train[90:]"), None)
    True

    Raises:
        DataError: a slice is empty, or the number of documents is needed and not known.
    """
    if one.name != other.name:
        return False
    (a, a_end), (b, b_end) = slice_bounds(one, num_documents), slice_bounds(other, num_documents)
    return (b_end is None or a < b_end) and (a_end is None or b < a_end)


def check_disjoint(train: SplitSlice, evaluation: SplitSlice, count: Callable[[], int | None]) -> None:
    """Raises when documents would be evaluated that are trained on.

    Args:
        count: documents of the split; asked only where a slice cannot be resolved without.

    Raises:
        DataError: with both slices.
    """
    needed = train.needs_size or evaluation.needs_size
    if train.name == evaluation.name and overlap(train, evaluation, count() if needed else None):
        raise DataError(
            f"dataset.eval_split: {str(evaluation)!r} overlaps dataset.train_split: {str(train)!r}, so documents would "
            "be evaluated that were trained on; let one slice start where the other ends"
        )


def choose_eval_split(names: Sequence[str], train_split: str) -> str | None:
    """The split to evaluate on when none is named; never the training split.

    >>> choose_eval_split(["train", "test", "validation"], "train")
    'validation'
    """
    train_name = parse_split(train_split).name
    for name in EVAL_SPLITS:
        if name in names and name != train_name:
            return name
    return None


def choose_train_split(names: Sequence[str], requested: str | None) -> str:
    """The split to train on, slice and all: the requested one, else `train`, else the only one there is.

    Raises:
        DataError: it is not there.
    """
    if requested is not None:
        check_split(names, requested, "dataset.train_split")
        return requested
    if "train" in names:
        return "train"
    if len(names) == 1 and names[0] not in EVAL_SPLITS:
        return names[0]
    raise DataError(f"there is no split named train; set dataset.train_split to one of {', '.join(names)}")


def check_split(names: Sequence[str], requested: str, field: str) -> None:
    """Raises when the split that `requested` is, or is a slice of, is not there.

    Raises:
        DataError: with the names there are.
    """
    if parse_split(requested).name not in names:
        raise DataError(f"{field}: {requested!r} is not there; splits found: {', '.join(names)}")


def find_split(below: Sequence[str]) -> tuple[str, str | None]:
    """The split of a file, and the word that says so: the first split word in its folders, from the outermost, and in
    its name. A word counts as a whole only: no letter is next to it. Without one the file is train.

    >>> find_split(["en", "c4-validation.00001-of-00008.jsonl.gz"]), find_split(["testimonials.jsonl"])
    (('validation', 'validation'), ('train', None))
    """
    for part in below:
        if (found := _SPLIT_WORD.search(part)) is not None:
            return SPLIT_WORDS[found[1].lower()], found[1]
    return "train", None


def _parse_bound(text: str | None, split: str) -> Bound | None:
    if text is None:
        return None
    bound = Bound(value=int(text.rstrip("%")), percent=text.endswith("%"))
    if bound.percent and abs(bound.value) > 100:
        raise DataError(f"{split!r}: {bound} is more than everything; percents go from -100% to 100%")
    return bound


def _resolve_bound(bound: Bound, split: SplitSlice, num_documents: int | None) -> int:
    index = bound.value
    if num_documents is None:
        return index
    if bound.percent:
        index = round(bound.value * num_documents / 100)
    if bound.value < 0:
        index += num_documents
    if not 0 <= index <= num_documents:
        raise DataError(f"{split}: {bound} is outside of split {split.name!r}, which has {num_documents} documents")
    return index
