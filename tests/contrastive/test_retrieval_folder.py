"""Retrieval folders: what is read, the metrics by hand, and the command over the whole corpus."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from calls import call

from neobert.config.schema import Config
from neobert.contrastive.evaluate import embed_unit, evaluate_retrieval, retrieval
from neobert.contrastive.finetune import finetune
from neobert.contrastive.retrieval_folder import RetrievalSet, is_retrieval_folder, load_retrieval
from neobert.errors import DataError
from neobert.inference.text_encoder import load_text_encoder


def write_folder(folder: Path, qrels: str) -> Path:
    corpus = [
        {"_id": "d1", "title": "Ships", "text": "float"},
        {"_id": "d2", "text": "rain"},
        {"_id": "d3", "text": ""},
    ]
    queries = [{"_id": "q1", "text": " what floats "}, {"_id": "q2", "text": "never judged"}]
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{qrels}")
    return folder


def test_what_a_folder_holds(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", "q1\td1\t2\nq1\td2\t0\nq1\td3\t1\nq2\td1\t0\n")
    assert is_retrieval_folder(folder)
    assert not is_retrieval_folder(tmp_path)
    found = load_retrieval(folder)
    assert found.queries == {"q1": "what floats"}, "the other query has no answer"
    assert found.documents == {"d1": "Ships float", "d2": "rain", "d3": ""}
    assert found.judgements == {"q1": {"d1": 2, "d3": 1}}


@pytest.mark.parametrize(
    ("qrels", "said"),
    [
        ("q1\td1\t0\n", r"has no judgement above 0.*correct its qrels"),
        ("q9\td1\t1\n", r"qrels name the query 'q9', which is not in queries; correct them"),
        ("q1\td9\t1\n", r"qrels name the document 'd9', which is not in corpus; correct them"),
    ],
)
def test_judgements_that_do_not_fit(qrels: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        load_retrieval(write_folder(tmp_path / "set", qrels))


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"qrels/dev.tsv is not there; name a split that is \(there: test\)"):
        load_retrieval(write_folder(tmp_path / "set", "q1\td1\t1\n"), "dev")
    (tmp_path / "set" / "qrels" / "test.tsv").rename(tmp_path / "set" / "qrels" / "train.tsv")
    assert load_retrieval(tmp_path / "set").split == "train", "the only one"


def test_ndcg_with_grades_by_hand() -> None:
    """Ranks 1 to 4 are documents 0 to 3; the answers are document 1 (grade 3) and document 3 (grade 1)."""
    products = np.array([[4.0, 3.0, 2.0, 1.0]])
    found = retrieval(products, np.eye(4), [[1, 3]], [[3, 1]])
    gain, ideal = 3 / math.log2(3) + 1 / math.log2(5), 3 / math.log2(2) + 1 / math.log2(3)
    assert found["ndcg@10"] == pytest.approx(gain / ideal)
    assert found["mrr"] == pytest.approx(1 / 2)
    equal = retrieval(products, np.eye(4), [[3, 1]], [[1, 3]])
    assert equal == pytest.approx(found), "the order of the judgements does not matter"


def test_equal_products_are_ranked_as_in_trec_eval() -> None:
    found = RetrievalSet(
        label="", split="test", queries={"q": "q"}, documents={"a": "", "b": "", "c": ""}, judgements={"q": {"b": 1}}
    )
    same = lambda texts: np.ones((len(texts), 2), dtype=np.float32)  # noqa: E731
    assert evaluate_retrieval(found, same, same)["mrr"] == pytest.approx(1 / 2), "c, b, a"


def test_the_command_searches_the_whole_corpus_as_the_model_was_trained(
    contrastive: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run = write_folder(tmp_path / "set", "q1\td1\t2\nq1\td3\t1\n"), tmp_path / "run"
    prefixes = ["contrastive.anchor_prefix=about: ", "contrastive.positive_prefix=text: "]
    finetune(contrastive(run, "trainer.max_steps=1", "contrastive.pooling=cls", *prefixes))
    capsys.readouterr()
    assert call("contrastive/evaluate.py", run, folder) == 0
    line = capsys.readouterr().out
    assert "1 queries, 3 documents: ndcg@10" in line
    encoder = load_text_encoder(str(run))
    settings = encoder.settings
    assert (settings.pooling, settings.max_length) == ("cls", 32)
    assert dict(settings.prompts) == {"query": "about: ", "document": "text: "}
    expected = evaluate_retrieval(
        load_retrieval(folder), lambda x: embed_unit(encoder, x, "about: "), lambda x: embed_unit(encoder, x, "text: ")
    )
    found = re.search(r"ndcg@10 ([\d.]+), mrr ([\d.]+)", line)
    assert found is not None
    assert [float(x) for x in found.groups()] == pytest.approx(list(expected.values()), abs=1e-4)
    for flags, said in ((["--max-length", "2"], "--max-length: 2"), (["--pooling", "last"], "'last' is unknown")):
        assert call("contrastive/evaluate.py", run, folder, *flags) == 2
        assert said in capsys.readouterr().err


def test_columns_of_judgements_that_are_not_there(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", "")
    (folder / "qrels" / "test.tsv").write_text("query_id\tdoc_id\tscore\nq1\td1\t1\n")
    with pytest.raises(DataError, match=r"test.tsv has the columns query_id, doc_id, score; .* query-id, corpus-id"):
        load_retrieval(folder)
