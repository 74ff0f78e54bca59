"""The sets that are known by a short key: where they are on the hub, and how their rows become pairs."""

import re
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

    hub_name: str
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


def choose_set(name: str) -> str | None:
    """The key of the known set that `name` means: a key, a hub name or the last part of one; None for others."""
    wanted = _slug(name)
    for key, known in SETS.items():
        if wanted in (_slug(key), _slug(known.hub_name), _slug(known.hub_name.split("/")[-1])):
            return key
    return None


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9/]", "", name.lower())


SETS: dict[str, HubSet] = {
    "ALLNLI": HubSet(
        hub_name="sentence-transformers/all-nli",
        parts=(HubPart(config="triplet", examples=_columns("anchor", "positive", "negative")),),
    ),
    "AMAZONQA": HubSet(hub_name="embedding-data/Amazon-QA", parts=(HubPart(examples=_columns("query", "pos")),)),
    "CONCURRENTQA": HubSet(
        hub_name="stanfordnlp/concurrentqa-retrieval",
        parts=(HubPart(examples=_paragraphs),),
    ),
    "FEVER": HubSet(hub_name="mteb/fever", joined=True),
    "MSMARCO": HubSet(hub_name="mteb/msmarco", joined=True),
    "GITHUBISSUE": HubSet(
        hub_name="WhereIsAI/github-issue-similarity",
        parts=(HubPart(config="positive", examples=_columns("anchor", "positive")),),
    ),
    "GOOAQ": HubSet(
        hub_name="tomaarsen/gooaq-hard-negatives",
        parts=(HubPart(config="triplet-5", examples=_columns("question", "answer", *_numbered(5))),),
    ),
    "PAQ": HubSet(
        hub_name="embedding-data/PAQ_pairs",
        parts=(HubPart(examples=lambda row: _pair(_items(row)[0], _items(row)[1])),),
    ),
    "PUBMEDQA": HubSet(
        hub_name="sentence-transformers/pubmedqa",
        parts=(HubPart(config="triplet-20", examples=_columns("anchor", "positive", *_numbered(20))),),
    ),
    "QQP": HubSet(
        hub_name="embedding-data/QQP_triplets",
        parts=(HubPart(examples=lambda row: _pair(_items(row)["query"], _items(row)["pos"][:1], _items(row)["neg"])),),
    ),
    "SENTENCECOMP": HubSet(
        hub_name="embedding-data/sentence-compression",
        parts=(HubPart(examples=lambda row: _pair(_items(row)[1], _items(row)[0])),),
    ),
    "STACKEXCHANGE": HubSet(
        hub_name="sentence-transformers/stackexchange-duplicates",
        parts=(
            HubPart(config="body-body-pair", examples=_columns("body1", "body2")),
            HubPart(config="post-post-pair", examples=_columns("post1", "post2")),
        ),
    ),
    "STACKOVERFLOW": HubSet(
        hub_name="mteb/stackoverflowdupquestions-reranking",
        parts=(HubPart(examples=_columns("query", "positive", "negative")),),
    ),
    "STS12": HubSet(hub_name="mteb/sts12-sts", parts=(HubPart(examples=_similar),)),
    "STSBENCHMARK": HubSet(hub_name="mteb/stsbenchmark-sts", parts=(HubPart(examples=_similar),)),
    "TRIVIAQA": HubSet(
        hub_name="sentence-transformers/trivia-qa-triplet",
        parts=(HubPart(config="triplet", examples=_columns("anchor", "positive", "negative")),),
    ),
    "WIKIHOW": HubSet(hub_name="sentence-transformers/wikihow", parts=(HubPart(examples=_columns("text", "summary")),)),
}
"""Key -> set. `_columns` takes the first text of a positive column that holds a list."""
