"""A retrieval set on disk in the layout of BEIR (Thakur et al., arXiv 2104.08663): queries, a corpus, and judgements.

| file | columns |
|---|---|
| `queries.jsonl` | `_id`, `text` |
| `corpus.jsonl` | `_id`, `text`, and `title` where there is one |
| `qrels/SPLIT.tsv` | `query-id`, `corpus-id`, `score` |

A document is its title, a space and its text, as in BEIR and MTEB. All documents of the corpus are searched, those that
nobody judged too. Queries without a document above 0 are left out.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from neobert.config.schema_data import DatasetSection
from neobert.contrastive.examples import RawRow, as_number
from neobert.contrastive.reading import Limits, choose_table_files, read_file
from neobert.data.source.text import RecordCounts
from neobert.errors import DataError

_SPLITS = ("test", "validation", "dev", "train")
"""Of which the first that is there is evaluated on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalSet:
    """Queries that have answers, and the documents that are searched."""

    label: str
    split: str
    queries: dict[str, str]
    documents: dict[str, str]
    judgements: dict[str, dict[str, int]]
    """Of each query: grades above 0 of the documents that answer it."""

    def digest(self) -> str:
        """sha256 of everything in it."""
        return hashlib.sha256(repr((self.queries, self.documents, self.judgements)).encode()).hexdigest()


def is_retrieval_folder(path: Path) -> bool:
    """Whether a folder has the layout of a retrieval set."""
    return (path / "qrels").is_dir()


def load_retrieval(path: Path, split: str | None = None) -> RetrievalSet:
    """The set in a folder, with the judgements of `split` (default: test, else validation, dev or train).

    Raises:
        DataError: a file is missing, or a judgement names a query or a document that is not there.
    """
    if split is None:
        split = next((name for name in _SPLITS if (path / "qrels" / f"{name}.tsv").is_file()), _SPLITS[0])
    defaults = DatasetSection()
    counts = RecordCounts(max_bad=defaults.max_bad_records, where=str(path))
    limits = Limits(max_record_bytes=defaults.max_record_bytes, counts=counts)
    judged, queries, corpus = (read_file(file, limits) for file in choose_table_files(path, split))
    judgements: dict[str, dict[str, int]] = {}
    for row in judged:
        if "query-id" not in row or "corpus-id" not in row:
            raise DataError(
                f"{path}/qrels/{split}.tsv has the columns {', '.join(map(str, row))}; its first line must be "
                "query-id, corpus-id and score, with tabs between"
            )
        number = as_number(row.get("score", 1))
        grade = int(number) if number is not None and math.isfinite(number) else 0
        if grade > 0:
            judgements.setdefault(str(row["query-id"]), {})[str(row["corpus-id"])] = grade
    found = RetrievalSet(
        label=str(path),
        split=split,
        queries={name: text for name, text in _texts(queries) if name in judgements},
        documents=dict(_texts(corpus)),
        judgements=judgements,
    )
    _check(found)
    return found


def _texts(rows: Iterable[RawRow]) -> Iterable[tuple[str, str]]:
    for row in rows:
        title, text = (str(row.get(name) or "") for name in ("title", "text"))
        yield str(row.get("_id", row.get("id"))), f"{title} {text}".strip() if title else text.strip()


def _check(found: RetrievalSet) -> None:
    if not found.judgements:
        raise DataError(f"{found.label} has no judgement above 0, so no query has an answer; correct its qrels")
    for query, documents in found.judgements.items():
        if query not in found.queries:
            raise DataError(f"{found.label}: its qrels name the query {query!r}, which is not in queries; correct them")
        missing = next((name for name in documents if name not in found.documents), None)
        if missing is not None:
            raise DataError(
                f"{found.label}: its qrels name the document {missing!r}, which is not in corpus; correct them"
            )
