"""How the rows of the sets that are known by a short key (`neobert.data.known_sets`) become pairs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from neobert.contrastive.rows import Example, RawRow, as_number, as_text, as_texts


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
