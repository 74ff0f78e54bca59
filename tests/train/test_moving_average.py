"""`trainer.ema_decay`: evaluated, saved, continued bit for bit, and used by whatever loads a checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calls import call
from probes import forked_probes
from records import exact_steps, log_lines
from safetensors.torch import load_file

from neobert import load
from neobert.config.load import ConfigError
from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.export.verify import verify
from neobert.export.write import ExportRequest, export
from neobert.train.loop import pretrain
from neobert.weights.describe import WeightsError
from neobert.weights.encoder_weights import load_encoder_weights
from neobert.weights.folder import read_manifest

Tiny = Callable[..., Config]
EMA = ["trainer.ema_decay=0.8", "model.dropout_prob=0.1"]


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    pretrain(tiny(out, *EMA, "trainer.save_steps=1"))
    return out


def read(run: Path, step: int, name: str = "ema") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / str(step) / f"{name}.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_average_is_that_of_the_saved_weights(whole: Path) -> None:
    expected = {name: tensor.double() for name, tensor in read(whole, 1, "model").items()}
    first = read(whole, 1)
    # Step 1 took the initial weights with a weight of 0.1; they follow from the two files.
    initial = {name: (first[name].double() - 0.9 * expected[name]) / 0.1 for name in first}
    expected = {name: 0.1 * initial[name] + 0.9 * expected[name] for name in expected}
    for step in range(2, 13):
        decay, weights = min(0.8, step / (step + 9)), read(whole, step, "model")
        expected = {name: decay * expected[name] + (1 - decay) * weights[name].double() for name in expected}
    found = read(whole, 12)
    assert all(torch.allclose(found[name].double(), expected[name], atol=1e-5) for name in expected)
    assert not equal(found, read(whole, 12, "model"))
    assert "ema.safetensors" in read_manifest(whole / "checkpoints" / "12").files


@pytest.mark.parametrize("cut", [1, 5, 8, 11])
def test_a_resumed_run_has_the_average_of_the_uninterrupted_one(
    tiny: Tiny, tmp_path: Path, whole: Path, cut: int
) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, *EMA, f"trainer.resume_from_checkpoint={whole / 'checkpoints' / str(cut)}"))
    assert exact_steps(out) == exact_steps(whole, after=cut)
    assert equal(read(out, 12), read(whole, 12))
    theirs = [line for line in log_lines(whole, "eval_ema") if line["step"] > cut]
    assert [line for line in log_lines(out, "eval_ema") if line["step"] > cut] == theirs
    assert [line["step"] for line in theirs] == [step for step in (4, 8, 12) if step > cut]


@pytest.mark.parametrize("more", [[], ["trainer.async_save=true"]], ids=["blocking", "background"])
def test_an_average_that_starts_later_and_a_cut_on_either_side(tiny: Tiny, tmp_path: Path, more: list[str]) -> None:
    settings = [*EMA, *more, "trainer.ema_start_step=6", "trainer.mixed_precision=bf16"]
    uninterrupted = tmp_path / "whole"
    pretrain(tiny(uninterrupted, *settings))
    assert not (uninterrupted / "checkpoints" / "4" / "ema.safetensors").exists()
    assert [line["step"] for line in log_lines(uninterrupted, "eval_ema")] == [8, 12]
    for cut in (4, 8):
        out = tmp_path / f"cut-{cut}"
        pretrain(tiny(out, *settings, f"trainer.resume_from_checkpoint={uninterrupted / 'checkpoints' / str(cut)}"))
        assert equal(read(out, 12), read(uninterrupted, 12))


def test_training_itself_does_not_know_of_the_average(tiny: Tiny, tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, "model.dropout_prob=0.1"))
    assert exact_steps(out) == exact_steps(whole)
    assert equal(read(out, 12, "model"), read(whole, 12, "model"))
    assert log_lines(out, "eval") == log_lines(whole, "eval")
    assert log_lines(out, "eval_ema") == []


def test_the_evaluation_is_that_of_the_saved_average(tiny: Tiny, tmp_path: Path, whole: Path) -> None:
    evaluated = {line["step"]: line["loss"] for line in log_lines(whole, "eval_ema")}
    assert evaluated[0] == log_lines(whole, "eval")[0]["loss"], "it starts as a copy of the weights"
    assert evaluated[12] != log_lines(whole, "eval")[-1]["loss"]
    out = tmp_path / "run"
    pretrain(tiny(out, f"model.init_from={whole}", "model.init_weights=ema", "trainer.max_steps=1"))
    assert log_lines(out, "eval")[0]["loss"] == pytest.approx(evaluated[12], abs=1e-6)


def test_compiled_blocks_compute_with_the_average_too(tiny: Tiny, tmp_path: Path) -> None:
    compiled = ["trainer.torch_compile=true", "trainer.torch_compile_backend=aot_eager"]
    for name, more in (("plain", []), ("compiled", compiled)):
        pretrain(tiny(tmp_path / name, "trainer.ema_decay=0.8", "trainer.max_steps=4", *more))
    plain, other = (log_lines(tmp_path / name, "eval_ema") for name in ("plain", "compiled"))
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in plain], abs=1e-5)
    assert plain[-1]["loss"] != pytest.approx(log_lines(tmp_path / "plain", "eval")[-1]["loss"], abs=1e-3)


def test_switching_it_on_and_off_must_be_declared(tiny: Tiny, tmp_path: Path, whole: Path) -> None:
    resume = f"trainer.resume_from_checkpoint={whole / 'checkpoints' / '8'}"
    out = tmp_path / "off"
    with pytest.raises(StartupError, match=r"trainer.ema_decay +needs declaring +0.8 -> null"):
        pretrain(tiny(out, resume, "model.dropout_prob=0.1"))
    declared = "trainer.resume_allow=[trainer.ema_decay]"
    pretrain(tiny(out, resume, "model.dropout_prob=0.1", declared))
    assert "ema.safetensors is not continued" in (out / "training.log").read_text()
    assert not (out / "checkpoints" / "12" / "ema.safetensors").exists()
    on = tmp_path / "on"
    pretrain(tiny(on, *EMA, f"trainer.resume_from_checkpoint={out / 'checkpoints' / '12'}", declared))
    assert "has no average; it starts with the weights of step 12" in (on / "training.log").read_text()
    pretrain(tiny(tmp_path / "more", *EMA, f"trainer.resume_from_checkpoint={out}", declared, "trainer.max_steps=13"))
    later, weights, before = (
        read(tmp_path / "more", 13),
        read(tmp_path / "more", 13, "model"),
        read(out, 12, "model"),
    )
    decay = 13 / 22
    assert all(torch.allclose(later[n], decay * before[n] + (1 - decay) * weights[n], atol=1e-6) for n in later)


def test_a_damaged_average_is_found(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, *EMA, "trainer.max_steps=4"))
    (out / "checkpoints" / "4" / "ema.safetensors").unlink()
    with pytest.raises(StartupError, match=r"ema.safetensors is missing"):
        pretrain(tiny(out, *EMA, "trainer.resume_from_checkpoint=latest"))


def test_it_can_be_loaded_exported_and_used_by_the_scripts(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    averaged = load_encoder_weights(whole, weights="ema")
    assert equal(averaged.tensors, read(whole, 12))
    assert torch.equal(load(whole, weights="ema").module.head_weight, read(whole, 12)["encoder.embedding.weight"])
    done = export(ExportRequest(source=str(whole), output=tmp_path / "exported", weights="ema"))
    with forked_probes():
        (verdict,) = verify([(done.folder, str(whole))], kind="ema")
    assert verdict.passed
    card, loss = (done.folder / "README.md").read_text(), log_lines(whole, "eval_ema")[-1]["loss"]
    assert "- weights: their exponential moving average over the training" in card
    assert f"- held-out loss at step 12: {loss:.4f} nats" in card
    rows = load_encoder_weights(done.folder).tensors["encoder.embedding.weight"]
    assert torch.equal(rows, averaged.tensors["encoder.embedding.weight"][: len(rows)])
    answers = []
    for kind in ("model", "ema"):
        capsys.readouterr()
        assert call("predict.py", whole, "the [MASK] sees", "--json", "--weights", kind) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] != answers[1]


def test_weights_that_are_not_there_are_an_error(tmp_path: Path, tiny: Tiny) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, "trainer.max_steps=1"))
    with pytest.raises(WeightsError, match=r"no ema.safetensors: only checkpoints of runs with trainer.ema_decay"):
        load_encoder_weights(out, weights="ema")
    with pytest.raises(WeightsError, match=r"weights: 'swa' is unknown; write model or ema"):
        load_encoder_weights(out, weights="swa")


def test_settings_that_mean_nothing_are_errors(tiny: Tiny, tmp_path: Path) -> None:
    for overrides, message in (
        (["trainer.ema_decay=1"], r"trainer.ema_decay: 1.0 must be greater than 0 and less than 1"),
        (["trainer.ema_start_step=3"], r"ema_start_step: 3 has no effect without trainer.ema_decay"),
        (["trainer.ema_decay=0.9", "trainer.ema_start_step=12"], r"12 is not before the end of the run"),
        (["model.init_weights=ema"], r"model.init_weights: ema has no effect without model.init_from"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny(tmp_path / "run", *overrides)
