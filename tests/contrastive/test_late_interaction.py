"""MaxSim against its definition, a run with pooling `tokens`, its evaluation and its exported folder."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from calls import call
from test_retrieval_folder import write_folder
from torch import Tensor

from neobert.config.schema import Config
from neobert.contrastive.evaluate import embed_unit, evaluate_retrieval
from neobert.contrastive.finetune import finetune
from neobert.contrastive.retrieval_folder import load_retrieval
from neobert.export.verify import verify
from neobert.export.write import ExportRequest, export
from neobert.inference.text_encoder import load_text_encoder
from neobert.objectives import late_interaction
from neobert.objectives.late_interaction import TOKENS, TokenVectors, compare_pairs, join, max_sim, shorten

Contrastive = Callable[..., Config]


def texts(*lengths: int, seed: int = 0) -> TokenVectors:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(sum(lengths), 5, generator=generator, dtype=torch.float64, requires_grad=True)
    return TokenVectors(tokens, torch.tensor(lengths))


def reference(anchors: list[Tensor], candidates: list[Tensor]) -> Tensor:
    """The definition, one token after the other."""
    return torch.stack([torch.stack([(a @ c.T).amax(dim=1).mean() for c in candidates]) for a in anchors])


def test_max_sim_is_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    anchors, candidates = texts(3, 1, 4), texts(2, 5, 1, 3, seed=1)
    expected = reference(list(anchors.tokens_TD.split([3, 1, 4])), list(candidates.tokens_TD.split([2, 5, 1, 3])))
    weights = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    inputs = (anchors.tokens_TD, candidates.tokens_TD)
    gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    for products in (late_interaction._PRODUCTS, 1):  # At once, and candidate by candidate.
        monkeypatch.setattr(late_interaction, "_PRODUCTS", products)
        found = max_sim(anchors, candidates)
        assert torch.allclose(found, expected)
        for ours, theirs in zip(torch.autograd.grad((found * weights).sum(), inputs), gradients):
            assert torch.allclose(ours, theirs)
    pairs = compare_pairs(anchors, candidates[torch.tensor([1, 0, 3])])
    assert torch.allclose(pairs, expected[[0, 1, 2], [1, 0, 3]])


def test_texts_are_taken_split_and_joined() -> None:
    vectors = texts(2, 1, 3)
    first, second, third = vectors.tokens_TD.split([2, 1, 3])
    picked = vectors[torch.tensor([2, 0, 2])]
    assert picked.lengths_N.tolist() == [3, 2, 3]
    assert torch.equal(picked.tokens_TD, torch.cat([third, first, third]))
    assert torch.equal(vectors[1:].tokens_TD, torch.cat([second, third]))
    assert [len(block) for block in vectors.split(2)] == [2, 1]
    joined = join(vectors.split(2))
    assert isinstance(joined, TokenVectors)
    assert torch.equal(joined.tokens_TD, vectors.tokens_TD)
    short = shorten(vectors, 3)
    assert isinstance(short, TokenVectors)
    assert torch.allclose(short.tokens_TD, F.normalize(vectors.tokens_TD[:, :3], dim=1))


@pytest.fixture(scope="module")
def run(contrastive: Contrastive, pair_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on pairs, scored pairs and labelled texts, in chunks whose gradients are cached."""
    folder = tmp_path_factory.mktemp("late") / "run"
    names = ", ".join(f"{{name: {pair_files}/{name}.jsonl}}" for name in ("pairs", "scored", "labelled"))
    overrides = [
        f"contrastive.sets=[{names}]",
        "dataset.name=null",
        "contrastive.pooling=tokens",
        "contrastive.both_directions=true",
        "contrastive.hard_negative_weight=0.5",
        "contrastive.matryoshka_dims=[16]",
        "contrastive.anchor_prefix=about: ",
        "trainer.per_device_train_batch_size=4",
        "trainer.global_batch_size=8",
        "trainer.max_steps=8",
    ]
    finetune(contrastive(folder, *overrides))
    return folder


def test_a_run_learns_and_is_evaluated_token_by_token(run: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    scores = [line["sets"]["pairs"]["ndcg@10"] for line in lines if line["kind"] == "eval"]
    assert all(np.isfinite(line["loss"]) for line in lines if line["kind"] == "step")
    assert len(scores) == 3
    encoder = load_text_encoder(str(run))
    assert encoder.settings.pooling == TOKENS
    vectors = embed_unit(encoder, ["one", "one and two"])
    assert isinstance(vectors, TokenVectors)
    assert torch.allclose(vectors.tokens_TD.norm(dim=1), torch.ones(len(vectors.tokens_TD)))
    assert len(vectors) == 2


def test_the_commands(run: Path, pair_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "set", "q1\td1\t2\nq1\td3\t1\n")
    encoder = load_text_encoder(str(run))
    expected = evaluate_retrieval(
        load_retrieval(folder), lambda x: embed_unit(encoder, x, "about: "), lambda x: embed_unit(encoder, x)
    )
    assert call("contrastive/evaluate.py", run, folder) == 0
    found = re.search(r"ndcg@10 ([\d.]+)", capsys.readouterr().out)
    assert found is not None
    assert float(found[1]) == pytest.approx(expected["ndcg@10"], abs=1e-4)
    mine = ["contrastive/mine_negatives.py", run, pair_files / "pairs.jsonl", "--output", tmp_path / "mined.jsonl"]
    assert call(*mine) == 2
    assert "keeps a vector for every token" in capsys.readouterr().err
    assert call(*mine, "--pooling", "mean") == 0


def test_the_exported_folder(run: Path, tmp_path: Path) -> None:
    folder = export(ExportRequest(source=str(run), output=tmp_path / "exported")).folder
    modules = json.loads((folder / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Normalize", "2_MultiVectorMask"]
    assert "MultiVectorEncoder" in (folder / "README.md").read_text()
    assert load_text_encoder(str(folder)).settings == load_text_encoder(str(run)).settings


def test_the_exported_folder_in_sentence_transformers(run: Path, tmp_path: Path) -> None:
    """The package itself, where it is installed."""
    package = pytest.importorskip("sentence_transformers")
    folder = export(ExportRequest(source=str(run), output=tmp_path / "exported")).folder
    model = package.MultiVectorEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    queries, documents = ["what floats", "rain"], ["a ship floats", "it rains", "nothing"]
    theirs = model.similarity(model.encode_query(queries), model.encode_document(documents))
    encoder = load_text_encoder(str(run))
    ours = max_sim(embed_unit(encoder, queries, "about: "), embed_unit(encoder, documents))  # type: ignore[arg-type]
    assert torch.allclose(torch.as_tensor(theirs).cpu(), ours, atol=1e-5)
    (verdict,) = verify([(folder, str(run))])
    assert verdict.passed, verdict.describe()
    assert any(check.name == "sentence-transformers, tokens pooling" for check in verdict.checks)


def test_mteb_searches_with_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mteb", reason="needs the extra eval")
    folder = write_folder(tmp_path / "set", "q1\td1\t2\nq1\td3\t1\n")
    encoder = load_text_encoder(str(run))
    expected = evaluate_retrieval(
        load_retrieval(folder), lambda x: embed_unit(encoder, x, "about: "), lambda x: embed_unit(encoder, x)
    )
    capsys.readouterr()
    assert call("evaluation/run_mteb.py", run, "--tasks", folder, "--output", tmp_path / "out", "--json") == 0
    (score,) = json.loads(capsys.readouterr().out)["scores"]
    assert score["score"] == pytest.approx(expected["ndcg@10"], abs=1e-5)
