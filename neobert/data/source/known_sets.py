"""The sets of pairs that are known by a short key, and where they are on the hub."""

import re

ALL = ("all", "refinedweb")
"""Values of `dataset.name` for every known set; the second is the default of other NeoBERT code."""


def choose_set(name: str) -> str | None:
    """The key of the known set that `name` means: a key, a hub name or the last part of one; None for others."""
    slug = _slug(name)
    for key, hub_name in KNOWN_SETS.items():
        if slug in (_slug(key), _slug(hub_name), _slug(hub_name.split("/")[-1])):
            return key
    return None


def list_names(names: str | tuple[str, ...] | None) -> list[str]:
    """The sets that `dataset.name` of a contrastive config names; null names every known one."""
    listed = ALL[:1] if names is None else (names,) if isinstance(names, str) else names
    return [key for name in listed for key in (KNOWN_SETS if name.lower() in ALL else [name])]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9/]", "", name.lower())


KNOWN_SETS = {
    "ALLNLI": "sentence-transformers/all-nli",
    "AMAZONQA": "embedding-data/Amazon-QA",
    "CONCURRENTQA": "stanfordnlp/concurrentqa-retrieval",
    "FEVER": "mteb/fever",
    "MSMARCO": "mteb/msmarco",
    "GITHUBISSUE": "WhereIsAI/github-issue-similarity",
    "GOOAQ": "tomaarsen/gooaq-hard-negatives",
    "PAQ": "embedding-data/PAQ_pairs",
    "PUBMEDQA": "sentence-transformers/pubmedqa",
    "QQP": "embedding-data/QQP_triplets",
    "SENTENCECOMP": "embedding-data/sentence-compression",
    "STACKEXCHANGE": "sentence-transformers/stackexchange-duplicates",
    "STACKOVERFLOW": "mteb/stackoverflowdupquestions-reranking",
    "STS12": "mteb/sts12-sts",
    "STSBENCHMARK": "mteb/stsbenchmark-sts",
    "TRIVIAQA": "sentence-transformers/trivia-qa-triplet",
    "WIKIHOW": "sentence-transformers/wikihow",
}
"""Key -> name of the dataset on the hub."""
