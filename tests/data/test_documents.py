"""The one interface of documents: every kind of source cuts, counts and reads alike."""

import pytest
from datasets import Dataset

from neobert.config.schema_data import MixtureSource
from neobert.data.rows.lanes import RowOrder
from neobert.data.source.documents import Documents
from neobert.data.source.formats import list_splits
from neobert.data.source.spec import describe_source
from neobert.data.source.text import WHOLE, RecordCounts, Span
from neobert.errors import DataError

KINDS = ["indexed", "pieces", "text_indexed", "jsonl", "jsonl.gz", "parquet", "csv"]
ORDER = RowOrder(seed=1, max_seq_length=16, window_documents=8, min_length=1, truncate=False, packing="best_fit")

COUNTS = RecordCounts(max_bad=0, where="the test")


@pytest.fixture
def folder(tmp_path, corpora, tokenizer, texts):
    def find(kind):
        if kind != "pieces":
            return corpora[kind]
        rows = [
            (n, ids[i : i + 20]) for n, ids in enumerate(tokenizer.encode_batch(texts)) for i in range(0, len(ids), 20)
        ]
        Dataset.from_dict({"input_ids": [row for _, row in rows], "document": [n for n, _ in rows]}).save_to_disk(
            tmp_path / "pieces"
        )
        return tmp_path / "pieces"

    return find


def read(documents: Documents, span, tokenizer):
    counts = RecordCounts(max_bad=0, where="the test")
    return [document.tokens.tolist() for document in documents.open(span, tokenizer.encode_batch, counts, 10**6)]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_cut_counted_and_read_alike(kind, folder, tokenizer, texts):
    documents = list_splits(describe_source(str(folder(kind))))["train"](tokenizer)
    whole = [tokens.tolist() for tokens in tokenizer.encode_batch(texts)]
    assert read(documents, WHOLE, tokenizer) == whole
    assert documents.count() in ((150,) if documents.is_indexed else (150, None))
    for first, last in ((0, 10), (7, None), (20, 90), (149, 150)):
        span = documents.slice(first, last)
        assert read(documents, span, tokenizer) == whole[first:last]
        assert documents.count(span) == (len(whole[first:last]) if documents.is_indexed else None)
    assert read(documents, documents.slice(140, 150, size=150), tokenizer) == whole[140:]
    found = documents.first(documents.slice(5, None), ORDER, tokenizer.encode_batch, COUNTS, 12, None)
    assert found.num_documents == 12
    tokens = [token for number in range(len(found.lengths)) for token in found.get(number).tolist()]
    assert tokens == [token for document in whole[5:17] for token in document]
    assert read(documents, WHOLE.beyond(found.last), tokenizer) == whole[17:], "what is held out is not read again"
    few = documents.first(WHOLE, ORDER, tokenizer.encode_batch, COUNTS, None, 100)
    assert 0 < few.num_documents < 12


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_of_text_alone(kind, folder, tokenizer):
    documents = list_splits(describe_source(str(folder(kind))))["train"](tokenizer)
    assert (len(list(documents.token_blocks(1000))) > 0) is documents.is_tokenised
    if not documents.is_tokenised:
        assert documents.as_text("the corpus") is documents
        with pytest.raises(DataError, match=r"151"):
            documents.slice(0, 151)
        assert documents.slice(0, 151, is_cap=True) == WHOLE
        return
    with pytest.raises(DataError, match=r"the corpus is tokenised already; name text"):
        documents.as_text("the corpus")


def test_a_span_as_parts_of_shards():
    def cursor(shard, position):
        return {"shard": shard, "position": position}

    assert [*WHOLE.shards(2)] == [(0, WHOLE), (1, WHOLE)]
    assert [*Span(cursor(1, "x"), cursor(1, "y")).shards(3)] == [(1, Span("x", "y"))]
    assert [*Span(cursor(0, "x"), cursor(2, "y")).shards(5)] == [(0, Span("x")), (1, WHOLE), (2, Span(None, "y"))]
    assert [*Span(until=cursor(2, None)).shards(5)] == [(0, WHOLE), (1, WHOLE)], "null is before the first record"
    assert [*Span(cursor(1, None), cursor(1, None)).shards(5)] == []
    assert Span("a", "b").beyond(None) == Span("a", "b")
    assert Span("a", "b").beyond("c") == Span("c", "b")


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("tokens", {}, "6ddb3a21684b"),
        ("tokens", {"eval_samples": 3}, "5f2b6b99bd89"),
        ("tokens", {"train_split": "train[4:50]"}, "7ba837b118de"),
        ("tokens", {"train_split": "train[:60]"}, "308f888a7e7f"),
        ("tokens", {"train_split": "train[10%:]", "eval_samples": 2}, "5a8446173905"),
        ("pieces", {"eval_samples": 3}, "a6a8d87cf8aa"),
        ("pieces", {"train_split": "train[4:25]"}, "a320f781fa08"),
        ("text", {}, "d088b48384ba"),
        ("text", {"eval_samples": 3}, "01b7a7323be8"),
        ("text", {"train_split": "train[4:50]"}, "c31d5d2e7d50"),
        ("text", {"train_split": "train[:60]", "eval_samples": 2}, "a66b1d2e4446"),
        ("text", {"train_split": "train[4:50]", "streaming": False}, "87cb7967292d"),
        ("text", {"train_split": "train[4:]", "streaming": False, "eval_samples": 2}, "2ca776ae37fc"),
        ("mixture", {"eval_samples": 4}, "a09170e5270e"),
    ],
)
def test_fingerprints_are_those_of_checkpoints_that_are_already_written(
    tmp_path, make_config, make_data, kind, values, expected
):
    """Written by version 0.1: a checkpoint resumes, and a prepared folder is accepted, only where they stay."""
    ids = [[5 + n % 7] * (1 + n % 9) for n in range(60)]
    Dataset.from_dict({"input_ids": ids}).save_to_disk(tmp_path / "tokens")
    Dataset.from_dict({"input_ids": ids, "document": [n // 2 for n in range(60)]}).save_to_disk(tmp_path / "pieces")
    Dataset.from_dict({"text": [f"w{n} " * (1 + n % 9) for n in range(60)]}).save_to_disk(tmp_path / "text")
    tokens = MixtureSource(path=str(tmp_path / "tokens"), weight=3.0, max_documents=60)
    text = MixtureSource(path=str(tmp_path / "text"), weight=1.0, max_documents=40)
    source = {"mixture": (tokens, text)} if kind == "mixture" else {"path": str(tmp_path / kind)}
    data = make_data(make_config(num_lanes=1, **source, **values))
    assert data.fingerprint.removeprefix("sha256:")[:12] == expected
