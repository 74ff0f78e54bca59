"""Runs of causal language modelling, alone and as the first steps of a run, and everything that takes a checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from devices import cpu_only
from records import assert_same_run, log_lines
from safetensors.torch import load_file

import neobert
from neobert.config.schema import Config
from neobert.errors import DataError, StartupError
from neobert.export.forms import ExportError
from neobert.export.write import ExportRequest, export
from neobert.inference.next_tokens import ContinuedText
from neobert.train.loop import pretrain
from neobert.weights.encoder_weights import load_encoder_weights

Tiny = Callable[..., Config]
OBJECTIVE = "trainer.objective=clm"
GOLDEN = [5.973000, 5.834735, 5.545889, 5.214966]


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("causal") / "run"
    pretrain(tiny(out, OBJECTIVE, "model.dropout_prob=0.1", "trainer.max_steps=8"))
    return out


@cpu_only
def test_golden_losses(tiny: Tiny, tmp_path: Path) -> None:
    pretrain(tiny(tmp_path / "run", OBJECTIVE, "trainer.max_steps=4"))
    assert [s["loss"] for s in log_lines(tmp_path / "run", "step")] == pytest.approx(GOLDEN, abs=1e-4)


@pytest.mark.parametrize(
    "keys",
    [
        [OBJECTIVE, "model.dropout_prob=0.1", "trainer.z_loss=1e-4", "trainer.probe_steps=4"],
        [OBJECTIVE, "datacollator.pack_sequences=false", "trainer.log_train_accuracy=true"],
        ["datacollator.clm_steps=3", "trainer.torch_compile=true", "trainer.torch_compile_backend=eager"],
        ["datacollator.clm_steps=6", "datacollator.mlm_probability_final=0.1", "model.local_attention=8"],
    ],
    ids=["packed, dropout", "one document a row", "switch before the checkpoint, compiled", "switch after, windows"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(tiny: Tiny, tmp_path: Path, keys: list[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["datacollator.mlm_probability_final_step=8"] if any("final" in key for key in keys) else []
    pretrain(tiny(whole, *keys, *more, "trainer.max_steps=8"))
    pretrain(tiny(parts, *keys, *more, "trainer.max_steps=4", "scheduler.total_steps=8"))
    pretrain(tiny(parts, *keys, *more, "trainer.max_steps=8", "trainer.resume_from_checkpoint=latest"))
    assert_same_run(parts, whole, step=8)


def test_the_first_steps_are_those_of_the_objective_and_then_masks_follow(tiny: Tiny, tmp_path: Path) -> None:
    clm, both = tmp_path / "clm", tmp_path / "both"
    pretrain(tiny(clm, OBJECTIVE, "trainer.max_steps=4"))
    pretrain(tiny(both, "datacollator.clm_steps=2", "trainer.max_steps=4", "trainer.save_steps=2"))
    first, second = (log_lines(x, "step") for x in (clm, both))
    assert [s["loss"] for s in second[:2]] == [s["loss"] for s in first[:2]]
    targets = [s["num_targets"] for s in second]
    assert min(targets[:2]) > 3 * max(targets[2:]), "masks hide a fifth of the tokens"
    assert "the first 2 steps predict next tokens" in (both / "training.log").read_text()
    assert "masked tokens" in (both / "training.log").read_text(), "evaluated with masks"
    trained = [load_encoder_weights(str(both / "checkpoints" / step)).objective for step in ("2", "4")]
    assert trained == ["clm", "mlm"], "before the switch it predicts next tokens, and is not exported"


def test_the_evaluation_is_per_next_token_whatever_the_batches(tiny: Tiny, run: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    keys = ["model.dropout_prob=0.1", "trainer.max_steps=4", "scheduler.total_steps=8"]
    pretrain(tiny(more, OBJECTIVE, *keys, "trainer.per_device_eval_batch_size=3"))
    first, second = (log_lines(x, "eval")[0] for x in (run, more))
    assert 0.5 * first["num_tokens"] < first["num_targets"] < first["num_tokens"]
    assert first.pop("kind") == second.pop("kind") == "eval"
    assert second == pytest.approx(first, rel=1e-5)
    text = (run / "training.log").read_text()
    assert "next tokens of" in text
    assert "actual:" in text, "the starts of documents at the end"
    assert "[MASK]" not in text


def test_another_objective_does_not_resume_it(tiny: Tiny, run: Path) -> None:
    with pytest.raises(StartupError, match=r"trainer.objective +fixed +\"clm\" -> \"mlm\""):
        pretrain(tiny(run, "model.dropout_prob=0.1", "trainer.max_steps=9", "trainer.resume_from_checkpoint=latest"))


def test_a_trained_model_says_what_comes_next_and_fills_no_masks(run: Path) -> None:
    model = neobert.load(run, device="cpu")
    text, longer = "the old house", "the old house stands by the river"
    (answer, more) = model.predict([text, longer], top_k=2)
    assert isinstance(answer, ContinuedText)
    assert isinstance(more, ContinuedText)
    (tokens,) = model.encode([text]).documents
    hidden = model.hidden_states([text])[0]
    expected = model.module.logits(hidden)[:, : model.tokenizer.size].log_softmax(-1)
    losses = -expected[torch.arange(len(tokens) - 2), torch.from_numpy(tokens[1:-1]).long()]
    assert answer.loss == pytest.approx(losses.mean().item(), rel=1e-4)
    assert answer.following[0].token_id == int(expected[-2].argmax())
    torch.testing.assert_close(model.hidden_states([longer])[0][: len(tokens) - 1], hidden[:-1])
    with pytest.raises(ValueError, match=r"has a mask to fill.*causal language modelling"):
        model.predict(["the [MASK] house"])
    with pytest.raises(DataError, match=r"causal language modelling.*fills no masks"):
        model.fill_mask(["the [MASK] house"])
    assert model.embed(["one", "two"]).shape == (2, 32)


def test_a_masked_run_starts_from_it_and_only_that_is_exported(tiny: Tiny, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"causal language modelling.*trainer\.objective: mlm and model\.init_from"):
        export(ExportRequest(source=str(run), output=tmp_path / "exported"))
    keys = [f"model.init_from={run}", "optimizer.lr=1e-9", "trainer.max_steps=1", "trainer.eval_steps=0"]
    pretrain(tiny(tmp_path / "mlm", *keys))
    before = load_file(run / "checkpoints/8/model.safetensors")
    after = load_file(tmp_path / "mlm/checkpoints/1/model.safetensors")
    assert before.keys() == after.keys()
    torch.testing.assert_close(after["encoder.layers.0.qkv.weight"], before["encoder.layers.0.qkv.weight"])
    model = neobert.load(tmp_path / "mlm", device="cpu")
    assert model.objective.name == "mlm"
    assert model.fill_mask(["the [MASK] house"])[0].masks
