"""A run of replaced-token detection, and everything that takes its checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from devices import cpu_only
from records import assert_same_run, log_lines
from safetensors.torch import load_file

import neobert
from neobert.config.schema import Config
from neobert.errors import DataError, StartupError
from neobert.export.write import ExportRequest, export
from neobert.inference.scorer import OwnScorer
from neobert.objectives.replaced_token import JudgedText
from neobert.train.loop import pretrain

Tiny = Callable[..., Config]
OBJECTIVE = "trainer.objective=replaced_token"
GOLDEN = [0.693225, 0.690265, 0.675204, 0.648588]


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replaced") / "run"
    pretrain(tiny(out, OBJECTIVE, "model.dropout_prob=0.1", "trainer.max_steps=8"))
    return out


@cpu_only
def test_golden_losses(tiny: Tiny, tmp_path: Path) -> None:
    pretrain(tiny(tmp_path / "run", OBJECTIVE, "trainer.max_steps=4"))
    assert [s["loss"] for s in log_lines(tmp_path / "run", "step")] == pytest.approx(GOLDEN, abs=1e-4)


@pytest.mark.parametrize(
    "keys",
    [
        ["model.dropout_prob=0.1"],
        ["datacollator.pack_sequences=false", "datacollator.mask_units=words", "trainer.log_train_accuracy=true"],
    ],
    ids=["packed, dropout", "one document a row, words"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(tiny: Tiny, tmp_path: Path, keys: list[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(tiny(whole, OBJECTIVE, *keys, "trainer.max_steps=8"))
    pretrain(tiny(parts, OBJECTIVE, *keys, "trainer.max_steps=4", "scheduler.total_steps=8"))
    pretrain(tiny(parts, OBJECTIVE, *keys, "trainer.max_steps=8", "trainer.resume_from_checkpoint=latest"))
    assert_same_run(parts, whole, step=8)


def test_the_evaluation_is_of_all_documents_whatever_the_batches(tiny: Tiny, run: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    keys = ["model.dropout_prob=0.1", "trainer.max_steps=4", "scheduler.total_steps=8"]
    pretrain(tiny(more, OBJECTIVE, *keys, "trainer.per_device_eval_batch_size=3"))
    first, second = (log_lines(x, "eval")[0] for x in (run, more))
    assert first.keys() >= {"loss", "accuracy", "precision", "recall", "num_replaced"}
    assert 0 < first["num_replaced"] < first["num_targets"] < first["num_tokens"]
    assert first.pop("kind") == second.pop("kind") == "eval"
    assert second == pytest.approx(first, rel=1e-5)


def test_the_console_has_its_own_messages(run: Path) -> None:
    text = (run / "training.log").read_text()
    assert "loss of a model that knows only that 20% of the tokens are replaced" in text
    assert "precision" in text
    assert "replaced? " in text, "the starts of documents at the end"
    assert "neobert predict" in text
    assert "ppl" not in text
    assert "[MASK]" not in text
    assert "loss kernel" not in text


def test_another_objective_does_not_resume_it(tiny: Tiny, run: Path) -> None:
    with pytest.raises(StartupError, match=r"trainer.objective +fixed +\"replaced_token\" -> \"mlm\""):
        pretrain(tiny(run, "model.dropout_prob=0.1", "trainer.max_steps=9", "trainer.resume_from_checkpoint=latest"))


def test_a_trained_model_judges_tokens_and_fills_no_masks(run: Path) -> None:
    model = neobert.load(run, device="cpu")
    (judged, _) = model.predict(["the old house", "x"], top_k=2)
    assert isinstance(judged, JudgedText)
    assert "".join(x.token for x in judged.tokens).strip() == "the old house"
    assert all(0 < x.probability < 1 for x in judged.tokens)
    assert judged.describe().count("%") == 2
    hidden = model.hidden_states(["the old house"])[0]
    with torch.no_grad():
        expected = model.module.discriminator(hidden).sigmoid()[1:-1]  # type: ignore[operator]
    np.testing.assert_allclose([x.probability for x in judged.tokens], expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"has a mask to fill.*replaced-token detection"):
        model.predict(["the [MASK] house"])
    with pytest.raises(DataError, match=r"replaced-token detection.*fills no masks"):
        model.fill_mask(["the [MASK] house"])
    with pytest.raises(DataError, match=r"replaced-token detection.*fills no masks"):
        OwnScorer(model)
    assert model.embed(["one", "two"]).shape == (2, 32)


def test_the_encoder_is_exported_without_its_head(run: Path, tmp_path: Path) -> None:
    done = export(ExportRequest(source=str(run), output=tmp_path / "exported"))
    assert any("discriminator.dense.weight" in note for note in done.notes)
    config = json.loads((done.folder / "config.json").read_text())
    assert config["architectures"] == ["EuroBertModel"]
    assert not any("discriminator" in name for name in load_file(done.folder / "model.safetensors"))
    card = (done.folder / "README.md").read_text()
    assert "pipeline_tag: feature-extraction" in card
    assert "20% of the tokens replaced by random ones" in card
    assert "precision" in card
    assert "AutoModelForMaskedLM" not in card
    texts = ["the old house stands by the river.", "two"]
    model = neobert.load(done.folder, device="cpu")
    torch.testing.assert_close(model.embed(texts), neobert.load(run, device="cpu").embed(texts))
    with pytest.raises(ValueError, match=r"without its head.*give the run"):
        model.predict(texts)


def test_other_objectives_start_from_it_and_it_from_others(tiny: Tiny, run: Path, tmp_path: Path) -> None:
    pretrain(tiny(tmp_path / "mlm", f"model.init_from={run}", "trainer.max_steps=1", "trainer.eval_steps=0"))
    weights = load_file(tmp_path / "mlm/checkpoints/1/model.safetensors")
    assert not any(name.startswith("discriminator") for name in weights)
    keys = [f"model.init_from={tmp_path / 'mlm'}", OBJECTIVE, "optimizer.lr=1e-9", "trainer.max_steps=1"]
    pretrain(tiny(tmp_path / "again", *keys, "trainer.eval_steps=0"))
    again = load_file(tmp_path / "again/checkpoints/1/model.safetensors")
    torch.testing.assert_close(again["encoder.layers.0.qkv.weight"], weights["encoder.layers.0.qkv.weight"])
    assert again["discriminator.out.weight"].abs().sum() > 0


def test_compiled_losses_are_the_eager_ones(tiny: Tiny, tmp_path: Path) -> None:
    keys = [OBJECTIVE, "trainer.max_steps=2", "trainer.eval_steps=0", "trainer.save_model=false"]
    pretrain(tiny(tmp_path / "eager", *keys))
    pretrain(tiny(tmp_path / "compiled", *keys, "trainer.torch_compile=true", "trainer.torch_compile_backend=eager"))
    eager, compiled = ([s["loss"] for s in log_lines(x, "step")] for x in (tmp_path / "eager", tmp_path / "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-5)
