"""Pseudo-perplexity against a loop over tokens; groups, pieces, the chunked estimate and its bias."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neobert.errors import DataError
from neobert.inference import jobs
from neobert.inference.jobs import JobError
from neobert.inference.model import Model
from neobert.inference.packed import hidden_states
from neobert.inference.pseudo_perplexity import (
    ScoreSettings,
    Summary,
    masked_copies,
    pseudo_perplexity_to_file,
    score_documents,
    summarize,
)
from neobert.inference.texts import open_texts

SETTINGS = ScoreSettings(max_length=40, batch_tokens=300)


def naive(model: Model, tokens: np.ndarray) -> float:
    """One forward pass for each token of a document that fits."""
    ids = [model.tokenizer.cls_id, *tokens.tolist(), model.tokenizer.sep_id]
    total = 0.0
    weight = model.module.head_weight.detach()
    for index in range(1, len(ids) - 1):
        masked = np.array(ids, dtype=np.int32)
        masked[index] = model.tokenizer.mask_id
        hidden = hidden_states(model.module, [masked])[index]
        logits = (weight @ hidden)[: model.tokenizer.size]
        total -= float(logits.log_softmax(-1)[ids[index]])
    return total


def run(model: Model, source: Path, output: Path, settings: ScoreSettings = SETTINGS) -> Summary:
    with open_texts(str(source)) as texts:
        pseudo_perplexity_to_file(model, texts, output, settings)
    return summarize(output)


def _failing(real: Callable[..., Any], when: int) -> Callable[..., Any]:
    """A function that is interrupted at its call number `when`."""
    calls = iter(range(100))

    def call(*args: Any) -> Any:
        if next(calls) == when:
            raise KeyboardInterrupt
        return real(*args)

    return call


def test_every_token_is_masked_alone(loaded: Model, texts: list[str]) -> None:
    documents = loaded.tokenizer.encode_batch([text for text in texts[:40] if len(text) < 90])[:5]
    assert len(documents) == 5
    assert all(len(tokens) <= 38 for tokens in documents)
    expected = [naive(loaded, tokens) for tokens in documents]
    for batch_tokens in (1, 97, 8192):
        settings = ScoreSettings(max_length=40, batch_tokens=batch_tokens)
        scores = score_documents(loaded, documents, settings, None)
        assert [count for count, _ in scores] == [len(tokens) for tokens in documents]
        assert [nll for _, nll in scores] == pytest.approx(expected, rel=1e-5)
    as_many_chunks_as_tokens = score_documents(loaded, documents, settings, 1000)
    assert [nll for _, nll in as_many_chunks_as_tokens] == pytest.approx(expected, rel=1e-5)


def test_which_tokens_are_masked_together() -> None:
    maskable = np.array([1, 2, 4, 5, 6])
    exact = masked_copies(np.arange(8), maskable, None)
    assert [positions.tolist() for positions in exact] == [[1], [2], [4], [5], [6]]
    chunked = masked_copies(np.arange(8), maskable, 2)
    assert [positions.tolist() for positions in chunked] == [[1, 4, 6], [2, 5]]
    assert len(masked_copies(np.arange(8), maskable, 100)) == 5


def test_long_documents_are_cut_and_special_tokens_are_not_counted(loaded: Model) -> None:
    special = loaded.tokenizer.special_tokens["[UNK]"]
    (tokens,) = loaded.tokenizer.encode_batch(["the cat sees the mountain. " * 4])
    tokens = tokens[:20]
    settings = ScoreSettings(max_length=12)
    ((count, nll),) = score_documents(loaded, [tokens], settings, None)
    assert count == 20
    assert nll == pytest.approx(naive(loaded, tokens[:10]) + naive(loaded, tokens[10:]), rel=1e-5)
    with_special = np.concatenate([tokens[:5], [special], tokens[5:9]]).astype(np.int32)
    assert score_documents(loaded, [with_special], settings, None)[0][0] == 9


def test_lines_and_results_of_a_file(loaded: Model, jsonl: Path, tmp_path: Path) -> None:
    summary = run(loaded, jsonl, tmp_path / "s.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [line["record"] for line in lines] == [n for n in range(33) if n not in {3, 8, 12}]
    total, count = sum(line["nll"] for line in lines), sum(line["num_tokens"] for line in lines)
    assert summary.num_documents == 30
    assert summary.num_tokens == count
    assert summary.pseudo_perplexity == pytest.approx(math.exp(total / count))
    assert lines[0]["pseudo_perplexity"] == pytest.approx(math.exp(lines[0]["nll"] / lines[0]["num_tokens"]))
    low, high = summary.interval
    assert low < summary.pseudo_perplexity < high
    assert summarize(tmp_path / "s.jsonl") == summary, "the bootstrap has a fixed seed"
    assert [p.name for p in tmp_path.iterdir()] == ["s.jsonl"]
    few = run(loaded, jsonl, tmp_path / "few.jsonl", ScoreSettings(max_length=40, batch_tokens=300, max_documents=4))
    assert few.num_documents == 4


def test_the_interval_is_that_of_the_bootstrap(tmp_path: Path) -> None:
    """Equal documents have no spread; of two kinds in equal numbers the fraction is binomial."""
    lines = [{"num_tokens": 10, "nll": 20.0}] * 50
    (tmp_path / "equal").write_text("".join(json.dumps(line) + "\n" for line in lines))
    equal = summarize(tmp_path / "equal")
    assert equal.interval == pytest.approx((math.exp(2), math.exp(2)))
    lines = [{"num_tokens": 10, "nll": 20.0 + 10 * (n % 2)} for n in range(400)]
    (tmp_path / "mixed").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mixed = summarize(tmp_path / "mixed")
    half_width = 1.96 * 0.5 / math.sqrt(400)
    assert [math.log(x) for x in mixed.interval] == pytest.approx([2.5 - half_width, 2.5 + half_width], abs=0.012)


def test_a_killed_job_continues_with_the_same_lines(
    loaded: Model, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short.jsonl"  # The first document is long: most of the work would be its exact loss.
    short.write_text("".join(jsonl.read_text().splitlines(keepends=True)[1:]))
    settings = ScoreSettings(max_length=40, batch_tokens=60, chunked=3, bias_documents=9)
    run(loaded, short, tmp_path / "whole.jsonl", settings)
    real, output = jobs.save_done, tmp_path / "s.jsonl"
    for when in (1, 2, 1):  # after the lines were written, before they were recorded
        monkeypatch.setattr(jobs, "save_done", _failing(real, when))
        with pytest.raises(KeyboardInterrupt):
            run(loaded, short, output, settings)
        with output.open("a") as out:
            out.write('{"record": 99, "nu')
    monkeypatch.setattr(jobs, "save_done", real)
    with pytest.raises(JobError, match=r"other settings \(chunked was 3 and is 4\)"):
        run(loaded, short, output, ScoreSettings(max_length=40, batch_tokens=60, chunked=4, bias_documents=9))
    run(loaded, short, output, settings)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    with pytest.raises(JobError, match="exists already"):
        run(loaded, short, output, settings)


def test_the_bias_of_the_estimate_is_measured(loaded: Model, jsonl: Path, tmp_path: Path) -> None:
    settings = ScoreSettings(max_length=40, batch_tokens=300, chunked=2, bias_documents=30)
    exact = run(loaded, jsonl, tmp_path / "exact.jsonl")
    chunked = run(loaded, jsonl, tmp_path / "chunked.jsonl", settings)
    assert chunked.num_bias_documents == 30
    assert chunked.pseudo_perplexity != pytest.approx(exact.pseudo_perplexity, rel=1e-6)
    assert chunked.corrected == pytest.approx(exact.pseudo_perplexity, rel=1e-5), "measured on all documents"
    assert "chunked estimate" in chunked.describe()
    assert exact.bias is None
    some = ScoreSettings(max_length=40, batch_tokens=300, chunked=2, bias_documents=3)
    assert run(loaded, jsonl, tmp_path / "some.jsonl", some).num_bias_documents == 3


def test_errors(loaded: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--chunked: 1; write 2 or more"):
        ScoreSettings(max_length=40, chunked=1)
    with pytest.raises(ValueError, match="--max-length: 2; write 3 or more"):
        ScoreSettings(max_length=2)
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": " "}\n')
    with pytest.raises(DataError, match="has no text to score"):
        run(loaded, blank, tmp_path / "s.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["blank.jsonl"]
