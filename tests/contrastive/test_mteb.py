"""`neobert mteb` on local sets, offline: our numbers, results per checkpoint, and a second call that skips them."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from calls import call
from test_retrieval_folder import write_folder

from neobert.config.schema import Config
from neobert.contrastive.evaluate import embed_unit, evaluate_examples, evaluate_retrieval
from neobert.contrastive.finetune import finetune
from neobert.contrastive.reading import PairSource, open_source
from neobert.contrastive.retrieval_folder import load_retrieval
from neobert.errors import DataError
from neobert.inference.text_encoder import OwnEncoder, load_text_encoder

pytest.importorskip("mteb", reason="needs the extra eval")


@pytest.fixture(scope="module")
def run(contrastive: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mteb") / "run"
    prefixes = ["contrastive.anchor_prefix=about: ", "contrastive.positive_prefix=text: "]
    finetune(contrastive(folder, "trainer.max_steps=4", *prefixes))
    return folder


@pytest.fixture(scope="module")
def sets(run: Path, pair_files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A set of each kind."""
    folder = tmp_path_factory.mktemp("sets")
    pairs = [json.loads(line) for line in (pair_files / "pairs.jsonl").read_text().splitlines()]
    corpus = [{"_id": f"d{n}", "title": "thing", "text": row["positive"]} for n, row in enumerate(pairs)]
    queries = [{"_id": f"q{n}", "text": row["anchor"]} for n, row in enumerate(pairs[:20])]
    grades = "".join(f"q{n}\td{n}\t2\nq{n}\td{n + 20}\t1\n" for n in range(20))
    retrieval = write_folder(folder / "things", grades)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (retrieval / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = (pair_files / "labelled.jsonl").read_text().splitlines(keepends=True)
    (folder / "verbs").mkdir()
    (folder / "verbs" / "train.jsonl").write_text("".join(labelled))
    (folder / "verbs" / "test.jsonl").write_text("".join(labelled[40:]))
    # No two cosines are as good as equal, which rounding would rank: it depends on what shares a batch.
    encoder = load_text_encoder(str(run))
    vectors = [embed_unit(encoder, [row[column] for row in pairs]) for column in ("anchor", "positive")]
    cosines = (vectors[0] * vectors[1]).sum(1)
    order = np.argsort(cosines)
    apart = [int(i) for i, gap in zip(order, np.diff(cosines[order], prepend=-2.0)) if gap > 1e-5]
    rows = [{"sentence1": pairs[n]["anchor"], "sentence2": pairs[n]["positive"], "score": n % 6} for n in sorted(apart)]
    assert len(rows) > 20
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"STS": folder / "scores.jsonl", "Retrieval": retrieval, "Classification": folder / "verbs"}


def test_mteb_and_our_own_metrics_are_equal(
    run: Path, sets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluation/run_mteb.py", run, "--tasks", *sets.values(), "--output", tmp_path / "out"]
    capsys.readouterr()
    assert call(*command, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {x["type"]: x["metric"] for x in report["scores"]} == {
        "STS": "cosine_spearman",
        "Retrieval": "ndcg_at_10",
        "Classification": "accuracy",
    }
    scores = {x["type"]: x["score"] for x in report["scores"]}
    encoder = load_text_encoder(str(run))
    examples = list(open_source(PairSource(name=str(sets["STS"]))).examples)
    ours = evaluate_examples("scored", examples, lambda texts: embed_unit(encoder, texts))
    assert scores["STS"] == pytest.approx(ours["spearman"], abs=1e-6), "mteb puts no prefix before texts of STS"
    found = load_retrieval(sets["Retrieval"])
    ours = evaluate_retrieval(
        found, lambda x: embed_unit(encoder, x, "about: "), lambda x: embed_unit(encoder, x, "text: ")
    )
    assert scores["Retrieval"] == pytest.approx(ours["ndcg@10"], abs=1e-5), "mteb rounds to five digits"
    assert 0 < scores["Classification"] < 1
    folder = Path(report["folder"])
    protocol = json.loads((folder / "protocol.json").read_text())
    assert folder.parent.name == "local__run"
    assert protocol["digest"].startswith(folder.name)
    assert protocol["prompts"] == [["query", "about: "], ["document", "text: "]]

    (torn,) = folder.glob("things-*.json")
    torn.write_text(torn.read_text()[:40])
    assert call(*command) == 0
    table = capsys.readouterr().out
    assert len(re.findall(r"\(before\)", table)) == 2, "the torn result is made again"
    assert f"{scores['Retrieval']:.4f}" in table


def test_other_settings_have_other_results(run: Path) -> None:
    encoder = load_text_encoder(str(run))
    assert isinstance(encoder, OwnEncoder)
    assert encoder.digest() == load_text_encoder(str(run)).digest()
    others = [
        load_text_encoder(str(run), pooling="cls"),
        load_text_encoder(str(run), max_length=16),
        OwnEncoder(model=encoder.model, settings=replace(encoder.settings, prompts=())),
    ]
    assert len({encoder.digest(), *(other.digest() for other in others)}) == 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tasks", "./not/there"], "./not/there is not there"),
        (["--tasks", "STSBenchmrk"], "STSBenchmark"),
        (["--task-types", "Cooking"], "'Cooking' is unknown; mteb has "),
        (["--benchmark", "MTEB(eng, v9)"], "MTEB(eng"),
        (["--benchmark", "MTEB(eng, v2)", "--languages", "deu"], "--languages: a benchmark has its own"),
    ],
)
def test_what_cannot_be_evaluated(
    flags: list[str], said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("evaluation/run_mteb.py", run, "--output", tmp_path / "out", *flags) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_encoder_of_others(tmp_path: Path) -> None:
    """By sentence-transformers, with the modules it brings."""
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ship", "rain"]
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(tmp_path)
    config = BertConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    encoder = load_text_encoder(str(tmp_path), max_length=4)
    assert encoder.embed(["ship rain", "rain"]).shape == (2, 8)
    long, cut = encoder.embed(["ship rain rain rain rain", "ship rain"])
    assert np.allclose(long, cut, atol=1e-6)
    prompted = SentenceTransformer(str(tmp_path), prompts={"query": "rain "}, default_prompt_name="query")
    prompted.save(str(tmp_path / "prompted"))
    found = load_text_encoder(str(tmp_path / "prompted"), max_length=4)
    assert np.allclose(found.embed(["ship"]), encoder.embed(["ship"]), atol=1e-6), "no prompt that nobody asked for"
    assert not np.allclose(found.embed(["ship"]), found.embed(["ship"], prefix="rain "), atol=1e-4)
    with pytest.raises(DataError, match=r"--pooling: .* is no encoder of ours"):
        load_text_encoder(str(tmp_path), pooling="cls")
