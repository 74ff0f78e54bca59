"""Evaluation on held-out sets: the same examples every time, all of them, whatever the training did.

Scored pairs give Spearman's correlation between cosine and score. Other pairs are a retrieval task: every different
anchor is a query, the collection is every different positive and negative of the set, and the positives of an anchor
answer it. In a folder with `qrels/` queries, corpus and grades are those of the folder. Texts are embedded as
`scripts/embed.py` and an exported model would embed them, cut at `dataset.max_seq_length`. Processes split the texts
and rank 0 puts the vectors together, so their number does not matter.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from neobert.config.schema_contrastive import PairSource
from neobert.contrastive.examples import Example, Form
from neobert.contrastive.pair_data import ContrastiveData, HeldOut
from neobert.contrastive.reading import open_source
from neobert.contrastive.retrieval_folder import RetrievalSet, is_retrieval_folder, load_retrieval
from neobert.correlation import spearman
from neobert.errors import DataError
from neobert.inference.text_encoder import OwnEncoder, TextEncoder, check_max_length, load_text_encoder
from neobert.objectives.contrastive import choose_vectors
from neobert.objectives.late_interaction import TokenVectors, compare_pairs, join_tokens, max_sim
from neobert.train.processes.agreement import broadcast, send_to_main, sharing_errors
from neobert.train.run import Run

Floats = NDArray[np.floating[Any]]

TOP = 10
_QUERIES = 256
"""Queries compared with the whole collection at once."""


UnitVectors = NDArray[np.float32] | TokenVectors
"""`[texts, H]`, of length 1; or those of all tokens, which MaxSim compares."""


def compare_block(queries: UnitVectors, documents: UnitVectors, block: slice) -> Floats:
    """Similarities `[queries of the block, C]`."""
    if isinstance(queries, TokenVectors):
        assert isinstance(documents, TokenVectors), "of one encoder"
        found: Floats = max_sim(queries[block], documents).numpy()
        return found
    assert not isinstance(documents, TokenVectors), "of one encoder"
    return queries[block] @ documents.T


def retrieval(
    queries: UnitVectors,
    documents: UnitVectors,
    relevant: Sequence[Sequence[int]],
    grades: Sequence[Sequence[int]] | None = None,
) -> dict[str, float]:
    """Mean nDCG@10 and mean reciprocal rank of the first relevant document, by scalar products or MaxSim.

    Args:
        queries: Q of them.
        documents: C of them.
        relevant: numbers of the documents that answer each query, at least one.
        grades: the gain of each of them, above 0; by default 1.

    Gains are discounted by log2(1 + rank) (Järvelin & Kekäläinen, 2002). Equal products are ranked in the order of the
    documents.
    """
    discounts = 1 / np.log2(np.arange(2, TOP + 2))
    grades = [[1] * len(expected) for expected in relevant] if grades is None else grades
    ndcg, reciprocal = [], []
    for start in range(0, len(queries), _QUERIES):
        block = slice(start, start + _QUERIES)
        orders = np.argsort(-compare_block(queries, documents, block), axis=1, kind="stable")
        for order, expected, graded in zip(orders, relevant[block], grades[block]):
            gains = np.zeros(len(order))
            gains[list(expected)] = graded
            found, ideal = gains[order], np.sort(graded)[::-1][:TOP]
            gain = float((found[:TOP] * discounts[: len(found)]).sum())
            ndcg.append(gain / float((ideal * discounts[: len(ideal)]).sum()))
            reciprocal.append(1 / (1 + int(np.argmax(found > 0))))
    return {f"ndcg@{TOP}": float(np.mean(ndcg)), "mrr": float(np.mean(reciprocal))}


Embed = Callable[[Sequence[str]], UnitVectors]
Measure = Callable[[UnitVectors], dict[str, float]]

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
    with run.tracker.paused(), run.reporter.bar("evaluating", len(data.held_out)) as advance:
        for part in data.held_out:
            if run.stop.agree(*run.runtime.sum_on_host(run.stop.requests())):
                return None
            with sharing_errors(run.runtime):
                found[part.key] = _evaluate_set(run, part)
            main.append(found[part.key][MAIN[part.store.info.form]])
            advance()
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
    texts, measure = plan_evaluation(part.store.info.form, examples)
    vectors = embed_shared(run, texts)
    return broadcast(run.runtime, {} if vectors is None else measure(vectors))


def evaluate_examples(form: Form, examples: Sequence[Example], embed: Embed) -> dict[str, float]:
    """Metrics of `embed` (texts to vectors of length 1) on pairs or scored pairs."""
    texts, measure = plan_evaluation(form, examples)
    return measure(embed(texts))


def plan_evaluation(form: Form, examples: Sequence[Example]) -> tuple[list[str], Measure]:
    """The texts of pairs or scored pairs, and what makes metrics of their vectors, which have length 1."""
    anchors, positives = [x.anchor for x in examples], [str(x.positive) for x in examples]
    if form == "scored":
        scores = np.array([x.score for x in examples], dtype=np.float64)

        def correlate(vectors: UnitVectors) -> dict[str, float]:
            return {"spearman": spearman(_compare_pairs(vectors[: len(scores)], vectors[len(scores) :]), scores)}

        return [*anchors, *positives], correlate
    negatives = [text for x in examples for text in x.negatives]
    queries, documents = list(dict.fromkeys(anchors)), list(dict.fromkeys([*positives, *negatives]))
    index = {text: number for number, text in enumerate(documents)}
    answers: dict[str, dict[int, None]] = {query: {} for query in queries}
    for anchor, positive in zip(anchors, positives):
        answers[anchor][index[positive]] = None
    relevant = [list(answers[query]) for query in queries]

    def retrieve(vectors: UnitVectors) -> dict[str, float]:
        return retrieval(vectors[: len(queries)], vectors[len(queries) :], relevant)

    return [*queries, *documents], retrieve


def _compare_pairs(anchors: UnitVectors, positives: UnitVectors) -> Floats:
    if isinstance(anchors, TokenVectors):
        assert isinstance(positives, TokenVectors), "of one encoder"
        found: Floats = compare_pairs(anchors, positives).numpy()
        return found
    assert not isinstance(positives, TokenVectors), "of one encoder"
    cosines: Floats = (anchors * positives).sum(axis=1)
    return cosines


def evaluate_retrieval(found: RetrievalSet, embed_queries: Embed, embed_documents: Embed) -> dict[str, float]:
    """Metrics of a retrieval set. Documents with equal products are ranked as in trec_eval: the last id first."""
    names = sorted(found.documents, reverse=True)
    index = {name: number for number, name in enumerate(names)}
    judged = [found.judgements[query] for query in found.queries]
    return retrieval(
        embed_queries(list(found.queries.values())),
        embed_documents([found.documents[name] for name in names]),
        relevant=[[index[name] for name in documents] for documents in judged],
        grades=[list(documents.values()) for documents in judged],
    )


def embed_shared(run: Run, texts: Sequence[str]) -> UnitVectors | None:
    """Vectors of all texts on rank 0, None on the others; each embeds its part. Collective."""
    config, runtime = run.config, run.runtime
    encoder = OwnEncoder(model=run.as_model(), settings=choose_vectors(config))
    parts = send_to_main(runtime, embed_unit(encoder, texts[runtime.rank :: runtime.world]))
    if parts is None:
        return None
    order = np.argsort(np.concatenate([np.arange(rank, len(texts), runtime.world) for rank in range(runtime.world)]))
    tokens = [part for part in parts if isinstance(part, TokenVectors)]
    if tokens:
        return join_tokens(tokens)[torch.from_numpy(order)]
    return np.concatenate([part for part in parts if not isinstance(part, TokenVectors)])[order]


def embed_unit(encoder: TextEncoder, texts: Sequence[str], prefix: str = "") -> UnitVectors:
    """Vectors of texts with `prefix` before each."""
    vectors = encoder.embed(texts, prefix=prefix)
    if isinstance(vectors, TokenVectors):
        return vectors
    return torch.nn.functional.normalize(torch.from_numpy(vectors), dim=-1).numpy()


def choose_prefixes(args: argparse.Namespace, encoder: TextEncoder) -> tuple[str, str]:
    """What is put before anchors and before positives: as the flags say, else as the model was trained."""
    prompts = dict(encoder.settings.prompts)
    anchor = prompts.get("query", "") if args.anchor_prefix is None else args.anchor_prefix
    positive = prompts.get("document", "") if args.positive_prefix is None else args.positive_prefix
    return anchor, positive


def load_encoder_of(args: argparse.Namespace) -> TextEncoder:
    """The encoder that the arguments of `build_pairs_parser` name."""
    where = {"device": args.device, "dtype": args.dtype}
    return load_text_encoder(args.model, **where, pooling=args.pooling, max_length=args.max_length)


def evaluate_file(args: argparse.Namespace) -> str:
    """Metrics of any model on any set, without a config: the line that the script prints.

    Raises:
        DataError: the set or the arguments cannot be used.
        WeightsError: there is no model.
    """
    check_max_length(args.max_length)
    if is_retrieval_folder(Path(args.pairs)):
        judged = load_retrieval(Path(args.pairs), args.split)
        encoder = load_encoder_of(args)
        query, document = choose_prefixes(args, encoder)
        found = evaluate_retrieval(
            judged, lambda texts: embed_unit(encoder, texts, query), lambda texts: embed_unit(encoder, texts, document)
        )
        return _describe(f"{judged.label}, {len(judged.queries):,} queries, {len(judged.documents):,} documents", found)
    opened = open_source(PairSource(name=args.pairs, split=args.split))
    if opened.form not in MAIN:
        raise DataError(f"{opened.label} has neither pairs nor scored pairs to evaluate on")
    encoder = load_encoder_of(args)
    anchor, positive = choose_prefixes(args, encoder)
    examples = [
        Example(
            anchor=anchor + x.anchor,
            positive=positive + str(x.positive),
            negatives=tuple(positive + text for text in x.negatives),
            score=x.score,
        )
        for x in opened.examples
    ]
    found = evaluate_examples(opened.form, examples, lambda texts: embed_unit(encoder, texts))
    return _describe(f"{opened.label}, {len(examples):,} rows", found)


def _describe(what: str, found: dict[str, float]) -> str:
    return f"{what}: " + ", ".join(f"{name} {x:.4f}" for name, x in found.items())
