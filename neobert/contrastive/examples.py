"""Rows of a source -> examples of one of four forms.

| form | an example has | from |
|---|---|---|
| `pairs` | anchor, positive, negatives | two texts that belong together |
| `scored` | anchor, positive, score | two texts and how similar they are |
| `labelled` | anchor, label | a text and its class |
| `texts` | anchor | a text |

Columns are those that were named, else the first of the usual names that a row has.

How the rows of the sets that are known by a short key (`neobert.data.source.known_sets`) become pairs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from neobert.config.schema_contrastive import PairSource
from neobert.data.source.tables import RawRow
from neobert.errors import DataError

Form = Literal["pairs", "scored", "labelled", "texts"]

FORM_NAMES: dict[Form, str] = {
    "pairs": "pairs",
    "scored": "scored pairs",
    "labelled": "labelled texts",
    "texts": "texts",
}
"""The forms for people."""

ANCHORS = ("anchor", "query", "question", "sentence1", "text1", "sentence", "text", "content")
POSITIVES = ("positive", "pos", "answer", "document", "passage", "sentence2", "text2")
NEGATIVES = ("negatives", "negative", "neg")
SCORES = ("score", "similarity", "similarity_score")
LABELS = ("label",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row of a set."""

    anchor: str
    positive: str | None = None
    negatives: tuple[str, ...] = ()
    score: float | None = None
    label: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Where the parts of an example are in a row."""

    anchor: str
    positive: str | None
    negatives: tuple[str, ...]
    score: str | None
    label: str | None

    @property
    def form(self) -> Form:
        if self.label is not None:
            return "labelled"
        if self.positive is None:
            return "texts"
        return "pairs" if self.score is None else "scored"

    def examples(self, row: RawRow) -> Iterator[Example]:
        """The examples of a row: one for each of its positives. Rows with an empty part give none."""
        anchor = as_text(row.get(self.anchor))
        if self.label is not None:
            label = row.get(self.label)
            if anchor and label is not None:
                yield Example(anchor=anchor, label=str(label))
        elif self.positive is None:
            if anchor:
                yield Example(anchor=anchor)
        elif self.score is not None:
            positive, score = as_text(row.get(self.positive)), as_number(row.get(self.score))
            if anchor and positive and score is not None:
                yield Example(anchor=anchor, positive=positive, score=score)
        elif anchor:
            negatives = tuple(text for column in self.negatives for text in as_texts(row.get(column)))
            for positive in as_texts(row.get(self.positive)):
                yield Example(anchor=anchor, positive=positive, negatives=negatives)


def as_text(value: Any) -> str:
    """A text without space around it; empty for what is no text."""
    return value.strip() if isinstance(value, str) else ""


def as_texts(value: Any) -> list[str]:
    """A text or a list of texts as a list; empty ones are left out."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [text for text in map(as_text, values) if text]


def as_number(value: Any) -> float | None:
    """A number, also one that is written as a text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def choose_columns(source: PairSource, names: Sequence[str], location: str) -> Columns:
    """The columns to read of a source whose rows have `names`.

    Raises:
        DataError: a named column is not there, or no column holds a text.
    """
    named = {
        "anchor_column": source.anchor_column,
        "positive_column": source.positive_column,
        "score_column": source.score_column,
        "label_column": source.label_column,
    }
    columns = source.negative_columns
    negatives = (columns,) if isinstance(columns, str) else columns
    requested = [
        *((key, name) for key, name in named.items() if name),
        *(("negative_columns", n) for n in negatives or ()),
    ]
    for key, name in requested:
        if name not in names:
            raise DataError(f"{location}: {key}: {name!r} is not there; its columns are {', '.join(names)}")
    anchor = source.anchor_column or _first(ANCHORS, names)
    if anchor is None:
        raise DataError(
            f"{location}: none of its columns ({', '.join(names)}) is called {', '.join(ANCHORS)}; name the column of "
            "the first text with anchor_column in contrastive.sets"
        )
    label = source.label_column
    positive = source.positive_column or (_first(POSITIVES, [n for n in names if n != anchor]) if not label else None)
    score = source.score_column or (_first(SCORES, names) if positive is not None else None)
    unread = _first(LABELS, names) if label is None and score is None else None
    if positive is not None and source.positive_column is None and unread is not None:
        raise DataError(
            f"{location}: it has two texts ({anchor}, {positive}) and a column {unread!r}, so it is not clear whether"
            f" every row is a pair; in contrastive.sets write score_column: {unread} where it says how similar they"
            f" are, or positive_column: {positive} to take every row as a pair"
        )
    if label is None and positive is None and source.score_column is None:
        label = _first(LABELS, names)
    if negatives is None:
        negatives = tuple(n for n in names if n in NEGATIVES or n.removeprefix("negative_").isdecimal())
    return Columns(anchor=anchor, positive=positive, negatives=negatives, score=score, label=label)


def _first(candidates: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in candidates if name in names), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class HubPart:
    """One configuration of a hub dataset."""

    config: str | None = None
    split: str = "train"
    examples: Callable[[RawRow], Iterator[Example]]


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSet:
    """A known set."""

    parts: tuple[HubPart, ...] = ()
    joined: bool = False
    """Its rows are relevance judgements between texts of the configurations `queries` and `corpus`."""


def _pair(anchor: Any, positives: Any, negatives: Any = ()) -> Iterator[Example]:
    """One pair of the first positive; nothing where a text is missing."""
    first, others = as_text(anchor), as_texts(positives)
    if first and others:
        yield Example(anchor=first, positive=others[0], negatives=tuple(as_texts(negatives)))


def _columns(anchor: str, positive: str, *negatives: str) -> Callable[[RawRow], Iterator[Example]]:
    def examples(row: RawRow) -> Iterator[Example]:
        texts = [text for name in negatives for text in as_texts(row.get(name))]
        return _pair(row.get(anchor), row.get(positive), texts)

    return examples


def _items(row: RawRow) -> Any:
    """The column `set` of the embedding-data collections."""
    return row["set"]


def _similar(row: RawRow) -> Iterator[Example]:
    score = as_number(row.get("score"))
    return _pair(row.get("sentence1"), row.get("sentence2")) if score is not None and score > 4 else iter(())


def _paragraphs(row: RawRow) -> Iterator[Example]:
    positives = [item["text"] for item in row["pos_paras"][:1]]
    return _pair(row["question"], positives, [item["text"] for item in row["neg_paras"]])


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"negative_{number}" for number in range(1, count + 1))


SETS: dict[str, HubSet] = {
    "ALLNLI": HubSet(
        parts=(HubPart(config="triplet", examples=_columns("anchor", "positive", "negative")),),
    ),
    "AMAZONQA": HubSet(parts=(HubPart(examples=_columns("query", "pos")),)),
    "CONCURRENTQA": HubSet(
        parts=(HubPart(examples=_paragraphs),),
    ),
    "FEVER": HubSet(joined=True),
    "MSMARCO": HubSet(joined=True),
    "GITHUBISSUE": HubSet(
        parts=(HubPart(config="positive", examples=_columns("anchor", "positive")),),
    ),
    "GOOAQ": HubSet(
        parts=(HubPart(config="triplet-5", examples=_columns("question", "answer", *_numbered(5))),),
    ),
    "PAQ": HubSet(
        parts=(HubPart(examples=lambda row: _pair(_items(row)[0], _items(row)[1])),),
    ),
    "PUBMEDQA": HubSet(
        parts=(HubPart(config="triplet-20", examples=_columns("anchor", "positive", *_numbered(20))),),
    ),
    "QQP": HubSet(
        parts=(HubPart(examples=lambda row: _pair(_items(row)["query"], _items(row)["pos"][:1], _items(row)["neg"])),),
    ),
    "SENTENCECOMP": HubSet(
        parts=(HubPart(examples=lambda row: _pair(_items(row)[1], _items(row)[0])),),
    ),
    "STACKEXCHANGE": HubSet(
        parts=(
            HubPart(config="body-body-pair", examples=_columns("body1", "body2")),
            HubPart(config="post-post-pair", examples=_columns("post1", "post2")),
        ),
    ),
    "STACKOVERFLOW": HubSet(
        parts=(HubPart(examples=_columns("query", "positive", "negative")),),
    ),
    "STS12": HubSet(parts=(HubPart(examples=_similar),)),
    "STSBENCHMARK": HubSet(parts=(HubPart(examples=_similar),)),
    "TRIVIAQA": HubSet(
        parts=(HubPart(config="triplet", examples=_columns("anchor", "positive", "negative")),),
    ),
    "WIKIHOW": HubSet(parts=(HubPart(examples=_columns("text", "summary")),)),
}
"""Key -> set. `_columns` takes the first text of a positive column that holds a list."""


def join(judgements: Iterable[RawRow], queries: Iterable[RawRow], corpus: Iterable[RawRow]) -> Iterator[Example]:
    """A pair for every judgement above 0, in their order, of the texts that they name. Only these are kept."""
    requested = [
        (str(row["query-id"]), str(row["corpus-id"])) for row in judgements if (as_number(row.get("score", 1)) or 0) > 0
    ]
    anchors = _texts(queries, {query for query, _ in requested})
    positives = _texts(corpus, {document for _, document in requested})
    for query, document in requested:
        if anchors.get(query) and positives.get(document):
            yield Example(anchor=anchors[query], positive=positives[document])


def _texts(rows: Iterable[RawRow], requested: set[str]) -> dict[str, str]:
    found = {}
    for row in rows:
        name = str(row.get("_id", row.get("id")))
        if name in requested:
            found[name] = as_text(row.get("text"))
    return found
