"""Pseudo-perplexity: how surprised a masked model is by each token of a text, given all the others.

    PPPL = exp(-(1 / N) sum over all N tokens of log p(token | the rest of its document))

(Salazar et al., arXiv 1910.14659). Every token is masked once, alone, in a copy of its document; copies of many
documents are packed into one forward pass. [CLS], [SEP] and other special tokens are neither masked nor counted, and
probabilities are over the tokens of the tokenizer. A document longer than the limit is cut in pieces, each a document.

The chunked estimate masks every k-th token of a document at once, so k copies are enough whatever its length. Each
token then misses some of its context, so the result is too high on average. How much is measured: the first
documents are scored exactly too, and both are reported.

Documents are read in groups that depend on the input alone. A group's lines are added to the output, then a small file
beside it says so; a job that was killed continues after the last group, with the numbers of an undisturbed one.

The interval of the result is a bootstrap over documents in one pass over the output: in each of the samples a document
counts as often as a Poisson variable of mean 1 says, which is the bootstrap's multinomial where there are many
(Chamandy et al., Estimating uncertainty for massive data streams, 2012). Memory does not depend on their number.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from neobert.data.rows.lanes import IntArray, State
from neobert.data.tokenizer import check_mask_token
from neobert.disk import only_writer
from neobert.errors import DataError
from neobert.inference.jobs import TextJob, Throughput, appending, progress_file
from neobert.inference.model import Model
from neobert.inference.packed import BATCH_TOKENS, hidden_states, plan_batches, token_losses
from neobert.inference.texts import Texts

GROUP_BATCHES = 8
"""A group of documents fills about so many batches."""

RESAMPLES = 1000
"""Bootstrap samples of a confidence interval."""

_ROWS_AT_ONCE = 1024
"""Documents whose weights in all samples exist at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSettings:
    """How documents are scored. Raises ValueError for numbers that make no sense."""

    max_length: int
    """Tokens of a piece, [CLS] and [SEP] included."""

    chunked: int | None = None
    """Mask every k-th token at once; None masks one at a time, which is exact."""

    bias_documents: int = 16
    """With `chunked`: so many first documents are scored exactly too."""

    max_documents: int | None = None
    batch_tokens: int = BATCH_TOKENS

    def __post_init__(self) -> None:
        if self.chunked is not None and self.chunked < 2:
            raise ValueError(f"--chunked: {self.chunked}; write 2 or more, larger is slower and nearer to exact")
        if self.max_length < 3:
            raise ValueError(f"--max-length: {self.max_length}; write 3 or more, [CLS] and [SEP] included")
        if self.batch_tokens < 1 or self.bias_documents < 0 or (self.max_documents or 1) < 1:
            raise ValueError("--batch-tokens, --max-documents and --bias-documents: write positive numbers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """A piece with some of its tokens masked."""

    document: int
    tokens: IntArray
    masked: NDArray[np.int64]


def masked_copies(tokens: IntArray, maskable: NDArray[np.int64], every: int | None) -> list[NDArray[np.int64]]:
    """The positions that are masked together: each one alone, or every `every`-th of them.

    >>> [positions.tolist() for positions in masked_copies(np.arange(7), np.array([1, 2, 3, 4, 5]), 2)]
    [[1, 3, 5], [2, 4]]
    """
    count = len(maskable) if every is None else min(every, len(maskable))
    return [maskable[first::count] for first in range(count)]


def score_documents(
    model: Model, documents: Sequence[IntArray], settings: ScoreSettings, every: int | None
) -> list[tuple[int, float]]:
    """(tokens counted, sum of their negative log likelihoods in nats) of documents without [CLS] and [SEP]."""
    copies = [
        copy for number, tokens in enumerate(documents) for copy in _copies(model, number, tokens, settings, every)
    ]
    sums, counts = np.zeros(len(documents)), np.zeros(len(documents), dtype=np.int64)
    for batch in plan_batches([len(copy.tokens) for copy in copies], settings.batch_tokens):
        chosen = [copies[item] for item in batch]
        losses = _copy_losses(model, chosen)
        numbers = np.repeat([copy.document for copy in chosen], [len(copy.masked) for copy in chosen])
        np.add.at(sums, numbers, losses)
        np.add.at(counts, numbers, 1)
    return list(zip(counts.tolist(), sums.tolist()))


def _copies(model: Model, number: int, tokens: IntArray, settings: ScoreSettings, every: int | None) -> Iterator[Copy]:
    cls_id, sep_id, content = model.tokenizer.cls_id, model.tokenizer.sep_id, settings.max_length - 2
    for start in range(0, len(tokens), content):
        piece = np.array([cls_id, *tokens[start : start + content], sep_id], dtype=np.int32)
        maskable = np.flatnonzero(~np.isin(piece, model.tokenizer.special_ids))
        for masked in masked_copies(piece, maskable, every):
            yield Copy(document=number, tokens=piece, masked=masked)


def _copy_losses(model: Model, copies: Sequence[Copy]) -> NDArray[np.float64]:
    """Negative log likelihoods of the masked tokens, copy after copy."""
    tokens = np.concatenate([copy.tokens for copy in copies])
    lengths = np.array([len(copy.tokens) for copy in copies])
    starts = np.repeat(np.cumsum(lengths) - lengths, [len(copy.masked) for copy in copies])
    positions = starts + np.concatenate([copy.masked for copy in copies])
    corrupted = tokens.copy()
    corrupted[positions] = model.tokenizer.mask_id
    hidden = hidden_states(model.module, np.split(corrupted, np.cumsum(lengths)[:-1]))
    where, targets = (torch.from_numpy(x).to(hidden.device) for x in (positions, tokens[positions].astype(np.int64)))
    losses = token_losses(model.module, hidden.index_select(0, where), targets, model.tokenizer.size)
    return losses.double().cpu().numpy()


class ScoredText(NamedTuple):
    """A text of the input with its tokens."""

    number: int
    tokens: IntArray
    cursor: State


def pseudo_perplexity_to_file(model: Model, texts: Texts, output: Path, settings: ScoreSettings) -> Throughput:
    """Scores an input, one JSON object a document; see the head of this module and `summarize`.

    Raises:
        JobError: the output is there and complete, or belongs to an unfinished job with other settings.
        DataError: the model fills no masks, the input has no text, the tokenizer's mask occurs in text, or another
            process writes this output.
    """
    model.check_fills_masks()
    check_mask_token(model.tokenizer)
    with only_writer(output):
        return _score_to_file(model, texts, output, settings)


def _score_to_file(model: Model, texts: Texts, output: Path, settings: ScoreSettings) -> Throughput:
    # Jobs of earlier versions counted under other names.
    known = {**asdict(settings), "model": model.digest(), "counts": "texts"}
    job = TextJob(texts, progress_file(output), known, bytes=0)
    with appending(job, output) as add:

        def score(group: Sequence[ScoredText]) -> None:
            lines = list(_score_group(model, group, settings, job.done["num_texts"]))
            job.done["num_texts"] += len(lines)
            job.done["num_tokens"] += sum(line["num_tokens"] for line in lines)
            add(map(json.dumps, lines))

        throughput = job.run("documents", _groups(model, job, settings), score, most=settings.max_documents)
    job.finish()
    if not job.done["num_texts"]:
        output.unlink()
        raise DataError(f"{texts.label} has no text to score; check the file and --text-column")
    return throughput


def _groups(model: Model, job: TextJob, settings: ScoreSettings) -> Iterator[list[ScoredText]]:
    """Documents with tokens to score, in groups of about as much work."""
    group: list[ScoredText] = []
    work, left = 0, math.inf if settings.max_documents is None else settings.max_documents - job.done["num_texts"]
    if left <= 0:
        return
    for record in job.records():
        if record.text is None:
            continue
        (tokens,) = model.tokenizer.encode_batch([record.text])
        if not len(np.setdiff1d(tokens, model.tokenizer.special_ids)):
            continue
        group.append(ScoredText(record.number, tokens, record.cursor))
        copies = len(tokens) if settings.chunked is None else min(settings.chunked, len(tokens))
        work, left = work + copies * min(len(tokens) + 2, settings.max_length), left - 1
        if work >= GROUP_BATCHES * settings.batch_tokens or not left:
            yield group
            group, work = [], 0
        if not left:
            return
    if group:
        yield group


def _score_group(
    model: Model, group: Sequence[ScoredText], settings: ScoreSettings, num_before: int
) -> Iterator[dict[str, Any]]:
    documents = [text.tokens for text in group]
    scores = score_documents(model, documents, settings, settings.chunked)
    num_exact = max(0, settings.bias_documents - num_before) if settings.chunked else 0
    exact = score_documents(model, documents[:num_exact], settings, None)
    for number, (text, (count, nll)) in enumerate(zip(group, scores)):
        line: dict[str, Any] = {"record": text.number, "num_tokens": count, "nll": nll}
        line["pseudo_perplexity"] = math.exp(nll / count)
        if number < len(exact):
            line["exact_nll"] = exact[number][1]
        yield line


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The results of a scored input, with 95% intervals from a bootstrap over documents."""

    num_documents: int
    num_tokens: int
    pseudo_perplexity: float
    interval: tuple[float, float]
    bias: float | None = None
    """Of a chunked estimate: its mean negative log likelihood a token less the exact one, in nats."""

    bias_interval: tuple[float, float] | None = None
    num_bias_documents: int = 0

    def describe(self) -> str:
        """The results in a few lines."""
        low, high = self.interval
        lines = [
            f"pseudo-perplexity {self.pseudo_perplexity:.4f} (95% interval {low:.4f} to {high:.4f}) over "
            f"{self.num_tokens:,} tokens of {self.num_documents:,} documents"
        ]
        if self.bias is not None and self.bias_interval is not None:
            low, high = self.bias_interval
            lines.append(
                f"chunked estimate: {self.bias:+.4f} nats a token against the exact one ({low:+.4f} to {high:+.4f}) on "
                f"the first {self.num_bias_documents} documents; less that, {self.corrected:.4f}"
            )
        return "\n".join(lines)

    @property
    def corrected(self) -> float:
        """The result less the measured bias."""
        return self.pseudo_perplexity * math.exp(-(self.bias or 0.0))


def summarize(output: Path) -> Summary:
    """The results of a file that `pseudo_perplexity_to_file` wrote."""
    every, exact = RatioOfSums(), RatioOfSums()
    with output.open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            every.add(record["num_tokens"], record["nll"])
            if "exact_nll" in record:
                exact.add(record["num_tokens"], record["nll"] - record["exact_nll"])
    mean, interval = every.mean_with_interval()
    bias = exact.mean_with_interval() if exact.num_rows else (None, None)
    return Summary(
        num_documents=every.num_rows,
        num_tokens=int(every.sums[0]),
        pseudo_perplexity=math.exp(mean),
        interval=(math.exp(interval[0]), math.exp(interval[1])),
        bias=bias[0],
        bias_interval=bias[1],
        num_bias_documents=exact.num_rows,
    )


class RatioOfSums:
    """Sum of values over sum of counts, and its 95% interval from a bootstrap over rows with a fixed seed; in memory
    that does not grow with the rows."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.sums = np.zeros(2)
        """Of counts and of values."""

        self._draws = np.zeros((RESAMPLES, 2))
        self._random = np.random.default_rng(0)
        self._waiting: list[tuple[int, float]] = []

    def add(self, count: int, value: float) -> None:
        self.num_rows += 1
        self._waiting.append((count, value))
        if len(self._waiting) == _ROWS_AT_ONCE:
            self._draw()

    def mean_with_interval(self) -> tuple[float, tuple[float, float]]:
        """The ratio of at least one row, and its interval."""
        self._draw()
        counts, values = self._draws[self._draws[:, 0] > 0].T  # Of few rows, some samples have none.
        low, high = np.quantile(values / counts, (0.025, 0.975))
        return float(self.sums[1] / self.sums[0]), (float(low), float(high))

    def _draw(self) -> None:
        if not self._waiting:
            return
        rows = np.array(self._waiting, dtype=np.float64)
        self._draws += self._random.poisson(1.0, size=(RESAMPLES, len(rows))) @ rows
        self.sums += rows.sum(axis=0)
        self._waiting.clear()
