"""What mteb evaluates: its own tasks by name, type or benchmark, and local folders, which run offline.

| local folder or file | task | metric |
|---|---|---|
| two texts and a score | STS | Spearman's correlation of cosines |
| queries, a corpus and `qrels/` | Retrieval | nDCG@10 |
| a text and a label, in two splits | Classification | accuracy of logistic regression, mteb's draws of 8 a class |

The name of a local task ends with a digest of its data, so that results of other data are never taken for its own.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTask, AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata, TaskType

from neobert.config.schema_contrastive import PairSource
from neobert.contrastive.examples import Example
from neobert.contrastive.reading import looks_local, open_source
from neobert.contrastive.retrieval_folder import RetrievalSet, is_retrieval_folder, load_retrieval
from neobert.data.source.files import kind_of_name
from neobert.data.source.splits import SPLIT_WORDS
from neobert.errors import DataError

TEST_SPLITS = ("test", "validation")
"""The split of a local set that is evaluated on, the first that is there."""


def choose_named_tasks(names: Sequence[str], split: str | None, languages: Sequence[str] | None) -> list[AbsTask]:
    """Tasks of mteb by name, and local sets by path.

    Raises:
        DataError: there is no such task or path, or the set cannot be used.
    """
    return [
        build_local_task(Path(name), split) if Path(name).exists() else _find_task(name, languages) for name in names
    ]


def _find_task(name: str, languages: Sequence[str] | None) -> AbsTask:
    if looks_local(name) or "/" in name:
        raise DataError(f"--tasks: {name} is not there; name a local file or folder, or a task of mteb")
    try:
        return mteb.get_task(name, languages=languages)
    except KeyError as error:
        raise DataError(f"--tasks: {error.args[0]} It is neither a task of mteb nor a local file or folder") from None


def choose_tasks_of_types(types: Sequence[str], languages: Sequence[str]) -> list[AbsTask]:
    """All text tasks of mteb of these types that have one of the languages.

    Raises:
        DataError: a type is unknown, or none is left.
    """
    known = sorted(get_args(TaskType))
    for name in types:
        if name not in known:
            raise DataError(f"--task-types: {name!r} is unknown; mteb has {', '.join(known)}")
    found = mteb.get_tasks(
        task_types=list(types), languages=list(languages), modalities=["text"], exclusive_modality_filter=True
    )
    if not found:
        raise DataError(f"--task-types: mteb has no task of {', '.join(types)} in {', '.join(languages)}")
    return list(found)


def find_benchmark(name: str) -> Any:
    """A benchmark of mteb, such as `MTEB(eng, v2)`.

    Raises:
        DataError: there is none of that name.
    """
    try:
        return mteb.get_benchmark(name)
    except KeyError as error:
        raise DataError(f"--benchmark: {error.args[0]}") from None


# ---- local sets ----


def build_local_task(path: Path, split: str | None) -> AbsTask:
    """A local set as a task.

    Raises:
        DataError: it cannot be read, or is none of the three kinds.
    """
    if is_retrieval_folder(path):
        return LocalRetrieval(path, load_retrieval(path, split))
    chosen, form, examples = _read_split(path, split)
    if form == "scored":
        return LocalSTS(path, examples, chosen)
    if form == "labelled":
        _, _, train = _read_split(path, "train")
        return LocalClassification(path, train, examples, chosen)
    raise DataError(
        f"--tasks: {path} has neither two texts and a score, nor a text and a label, nor qrels/, so it is no task"
    )


def _read_split(path: Path, split: str | None) -> tuple[str, str, list[Example]]:
    if path.is_file():
        if split == "train":
            raise DataError(f"--tasks: {path} is one file; a classification needs a folder with train and test splits")
        opened = open_source(PairSource(name=str(path)))
        return TEST_SPLITS[0], opened.form, list(opened.examples)
    words = {
        SPLIT_WORDS.get(word, word)
        for file in path.rglob("*")
        if kind_of_name(file.name) or file.name == "state.json"
        for word in re.split(r"[\W\d_]+", str(file.relative_to(path)).lower())
    }
    chosen = split or next((name for name in TEST_SPLITS if name in words), TEST_SPLITS[0])
    opened = open_source(PairSource(name=str(path), split=chosen))
    return chosen, opened.form, list(opened.examples)


def _describe(path: Path, kind: str, metric: str, split: str, digest: str) -> TaskMetadata:
    return TaskMetadata(
        name=f"{path.resolve().name.split('.')[0]}-{digest[:8]}",
        description=f"The local set {path}",
        dataset={"path": str(path), "revision": digest},
        type=kind,
        eval_splits=[split],
        eval_langs=["eng-Latn"],  # Must be named; nothing is read from it.
        main_score=metric,
    )


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


class LocalSTS(AbsTaskSTS):
    """Pairs of texts and how similar they are."""

    def __init__(self, path: Path, examples: Sequence[Example], split: str) -> None:
        rows = {
            "sentence1": [x.anchor for x in examples],
            "sentence2": [str(x.positive) for x in examples],
            "score": [x.score for x in examples],
        }
        self.metadata = _describe(path, "STS", "cosine_spearman", split, _digest(split, rows))
        super().__init__()
        self.dataset, self.data_loaded = DatasetDict({split: Dataset.from_dict(rows)}), True


class LocalRetrieval(AbsTaskRetrieval):
    """Queries, documents, and which of them answer which query."""

    def __init__(self, path: Path, found: RetrievalSet) -> None:
        self.metadata = _describe(path, "Retrieval", "ndcg_at_10", found.split, found.digest())
        super().__init__()
        queries, documents = (
            Dataset.from_dict({"id": list(texts), "text": list(texts.values())})
            for texts in (found.queries, found.documents)
        )
        data = {"corpus": documents, "queries": queries, "relevant_docs": found.judgements, "top_ranked": None}
        self.dataset, self.data_loaded = {"default": {found.split: data}}, True


class LocalClassification(AbsTaskClassification):
    """Texts with labels, to learn from and to test on."""

    def __init__(self, path: Path, train: Sequence[Example], test: Sequence[Example], split: str) -> None:
        numbers = {label: number for number, label in enumerate(sorted({str(x.label) for x in train}))}
        unknown = next((x.label for x in test if x.label not in numbers), None)
        if unknown is not None:
            raise DataError(f"--tasks: {path}: the label {unknown!r} of split {split} is not in its training split")
        parts = {
            name: {"text": [x.anchor for x in rows], "label": [numbers[str(x.label)] for x in rows]}
            for name, rows in ((split, test), ("train", train))
        }
        self.metadata = _describe(path, "Classification", "accuracy", split, _digest(split, parts))
        super().__init__()
        self.dataset = DatasetDict({name: Dataset.from_dict(rows) for name, rows in parts.items()})
        self.data_loaded = True
