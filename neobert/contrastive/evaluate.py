"""Evaluation on held-out sets: the same examples every time, all of them, whatever the training did.

Scored pairs give Spearman's correlation between cosine and score. Other pairs are a retrieval task: every different
anchor is a query, the collection is every different positive and negative of the set, and the positives of an anchor
answer it. Texts are embedded as `scripts/embed.py` and an exported model would embed them, cut at
`dataset.max_seq_length`. Processes split the texts and put the vectors together, so their number does not matter.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from neobert.config.schema_contrastive import PairSource
from neobert.contrastive.examples import Example, Form
from neobert.contrastive.pair_data import ContrastiveData, HeldOut
from neobert.contrastive.reading import open_source
from neobert.correlation import spearman
from neobert.errors import DataError
from neobert.inference.model import Model, load
from neobert.inference.packed import BATCH_TOKENS
from neobert.train.agreement import exchange, sharing_errors
from neobert.train.run import Run

Floats = NDArray[np.floating[Any]]

TOP = 10
_QUERIES = 256
"""Queries compared with the whole collection at once."""


def retrieval(queries_QD: Floats, documents_CD: Floats, relevant: Sequence[Sequence[int]]) -> dict[str, float]:
    """Mean nDCG@10 and mean reciprocal rank of the first relevant document, by scalar products.

    Args:
        relevant: numbers of the documents that answer each query, at least one.

    Gains are 0 or 1, discounted by log2(1 + rank) (Järvelin & Kekäläinen, 2002). Equal products are ranked in the
    order of the documents.
    """
    discounts = 1 / np.log2(np.arange(2, TOP + 2))
    ndcg, reciprocal = [], []
    for start in range(0, len(queries_QD), _QUERIES):
        products = queries_QD[start : start + _QUERIES] @ documents_CD.T
        orders = np.argsort(-products, axis=1, kind="stable")
        for order, expected in zip(orders, relevant[start : start + _QUERIES]):
            hits = np.isin(order, list(expected))
            gain = float((hits[:TOP] * discounts[: len(hits)]).sum())
            ndcg.append(gain / float(discounts[: len(expected)].sum()))
            reciprocal.append(1 / (1 + int(np.argmax(hits))))
    return {f"ndcg@{TOP}": float(np.mean(ndcg)), "mrr": float(np.mean(reciprocal))}


Embed = Callable[[Sequence[str]], NDArray[np.float32]]

MAIN: dict[Form, str] = {"scored": "spearman", "pairs": f"ndcg@{TOP}"}
"""The metric that counts in `score`, by the form of the set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveMetrics:
    """Metrics by set."""

    sets: dict[str, dict[str, float]]
    score: float
    """Mean over the sets of the metric that counts."""

    @property
    def loss(self) -> float:
        """1 - score."""
        return 1 - self.score

    @property
    def criterion(self) -> float:
        return self.loss

    def as_line(self) -> dict[str, Any]:
        return {"loss": self.loss, "score": self.score, "sets": self.sets}

    def as_values(self) -> dict[str, float]:
        values = {f"contrastive/{key}/{name}": x for key, metrics in self.sets.items() for name, x in metrics.items()}
        return {"contrastive/score": self.score, **values}

    def describe(self) -> str:
        parts = [f"score {self.score:.4f}"]
        for key, metrics in self.sets.items():
            parts.append(f"{key}: " + ", ".join(f"{name} {x:.4f}" for name, x in metrics.items()))
        return " | ".join(parts)


@torch.no_grad()
def evaluate_sets(run: Run) -> ContrastiveMetrics | None:
    """Metrics of all held-out sets; None when there are none, or when the run is asked to stop."""
    data = run.data
    assert isinstance(data, ContrastiveData), "the data of contrastive fine-tuning"
    if not data.held_out:
        return None
    found: dict[str, dict[str, float]] = {}
    main = []
    with run.tracker.paused():
        for part in data.held_out:
            if run.stop.agree(*run.runtime.sum_on_host(run.stop.requests())):
                return None
            with sharing_errors(run.runtime):
                found[part.key] = _evaluate_set(run, part)
            main.append(found[part.key][MAIN[part.store.info.form]])
    return ContrastiveMetrics(sets=found, score=float(np.mean(main)))


def _evaluate_set(run: Run, part: HeldOut) -> dict[str, float]:
    numbers = range(part.first, part.last)
    examples = [
        Example(
            anchor=part.anchor_prefix + row["anchor"],
            positive=part.positive_prefix + row["positive"],
            negatives=tuple(part.positive_prefix + text for text in row["negatives"] or ()),
            score=row["score"],
        )
        for row in map(part.store.get, numbers)
    ]
    return evaluate_examples(part.store.info.form, examples, lambda texts: embed_shared(run, texts))


def evaluate_examples(form: Form, examples: Sequence[Example], embed: Embed) -> dict[str, float]:
    """Metrics of `embed` (texts to vectors of length 1) on pairs or scored pairs."""
    anchors, positives = [x.anchor for x in examples], [str(x.positive) for x in examples]
    if form == "scored":
        vectors = embed([*anchors, *positives])
        cosines = (vectors[: len(anchors)] * vectors[len(anchors) :]).sum(axis=1)
        return {"spearman": spearman(cosines, np.array([x.score for x in examples], dtype=np.float64))}
    negatives = [text for x in examples for text in x.negatives]
    queries, documents = list(dict.fromkeys(anchors)), list(dict.fromkeys([*positives, *negatives]))
    index = {text: number for number, text in enumerate(documents)}
    answers: dict[str, dict[int, None]] = {query: {} for query in queries}
    for anchor, positive in zip(anchors, positives):
        answers[anchor][index[positive]] = None
    vectors = embed([*queries, *documents])
    relevant = [list(answers[query]) for query in queries]
    return retrieval(vectors[: len(queries)], vectors[len(queries) :], relevant)


def embed_shared(run: Run, texts: Sequence[str]) -> NDArray[np.float32]:
    """Vectors of length 1, `[texts, H]`, on every process; each embeds its part. Collective."""
    model, config, runtime = run.as_model(), run.config, run.runtime
    mine = texts[runtime.rank :: runtime.world]
    vectors = embed_cut(model, mine, pooling=config.contrastive.pooling, max_length=config.dataset.max_seq_length)
    result = np.empty((len(texts), model.hidden_size), dtype=np.float32)
    for rank, part in enumerate(exchange(runtime, vectors)):
        result[rank :: runtime.world] = part
    return result


def embed_cut(model: Model, texts: Sequence[str], *, pooling: str, max_length: int) -> NDArray[np.float32]:
    """Vectors of length 1 of texts cut at `max_length` tokens, [CLS] and [SEP] included."""
    cls_id, sep_id = model.tokenizer.cls_id, model.tokenizer.sep_id
    tokens = model.tokenizer.encode_batch(texts)
    documents = [np.array([cls_id, *ids[: max_length - 2], sep_id], dtype=np.int32) for ids in tokens]
    vectors = model.embed_tokens(documents, pooling=pooling, normalize=True, batch_tokens=BATCH_TOKENS)
    return vectors.numpy()


def check_max_length(value: int | None) -> None:
    """Raises DataError for a `--max-length` that leaves no token of a text."""
    if value is not None and value < 3:
        raise DataError(f"--max-length: {value}; write 3 or more, [CLS] and [SEP] included")


def evaluate_file(args: argparse.Namespace) -> str:
    """Metrics of any model on any set, without a config: the line that the script prints.

    Raises:
        DataError: the set or the arguments cannot be used.
        WeightsError: there is no model.
    """
    check_max_length(args.max_length)
    opened = open_source(PairSource(name=args.pairs, split=args.split))
    if opened.form not in MAIN:
        raise DataError(f"{opened.label} has neither pairs nor scored pairs to evaluate on")
    model = load(args.model, device=args.device, dtype=args.dtype)
    length = min(args.max_length or model.max_length, model.max_length)
    examples = [
        Example(
            anchor=args.anchor_prefix + x.anchor,
            positive=args.positive_prefix + str(x.positive),
            negatives=tuple(args.positive_prefix + text for text in x.negatives),
            score=x.score,
        )
        for x in opened.examples
    ]
    found = evaluate_examples(
        opened.form, examples, lambda texts: embed_cut(model, texts, pooling=args.pooling, max_length=length)
    )
    return f"{opened.label}, {len(examples):,} rows: " + ", ".join(f"{name} {x:.4f}" for name, x in found.items())
