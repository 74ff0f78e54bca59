"""The mean of the last checkpoints: its numbers, what it loads into, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calls import call
from records import log_lines
from safetensors.torch import load_file, save_file

from neobert import load
from neobert.commands.average_checkpoints import AverageRequest, average_checkpoints, average_files
from neobert.config.load import ConfigError
from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.export.write import ExportRequest, export
from neobert.train.loop import pretrain
from neobert.weights.encoder_weights import load_encoder_weights
from neobert.weights.folder import CheckpointError, check_contents

Tiny = Callable[..., Config]


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    pretrain(tiny(out, "trainer.save_steps=2", "trainer.eval_steps=0", "trainer.ema_decay=0.9"))
    return out


def weights_of(run: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / str(step) / f"{name}.safetensors")


def test_the_mean_of_the_last_three(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "mean"
    capsys.readouterr()
    assert call("average_checkpoints.py", run, "--last", "3", "--output", output) == 0
    expected = f"{output}/: the mean of 3 checkpoints of {run} (step x weight): 8 x 0.3333, 10 x 0.3333, 12 x 0.3333\n"
    assert capsys.readouterr().out == expected
    found = load_file(output / "model.safetensors")
    sources = [weights_of(run, step) for step in (8, 10, 12)]
    assert found.keys() == sources[0].keys()
    for name, tensor in found.items():
        mean = torch.stack([source[name].double() for source in sources]).mean(0)
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, mean.float()) or torch.allclose(tensor.double(), mean, rtol=1e-7, atol=0)
    assert json.loads((output / "average.json").read_text()) == {
        "run": str(run),
        "steps": [8, 10, 12],
        "shares": [1 / 3, 1 / 3, 1 / 3],
        "weights": "model",
    }
    assert check_contents(output).step == 12


def test_a_mean_is_exported_in_one_command(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("average_checkpoints.py", run, "--last", "2", "--output", tmp_path / "mean") == 0
    for source, more in ((tmp_path / "mean", []), (run, ["--average", "2"])):
        assert call("export/export_hf.py", source, *more, "--output", tmp_path / f"{source.name}_hf") == 0
    assert "the mean of 2 checkpoints of" in capsys.readouterr().err
    one, other = tmp_path / "mean_hf", tmp_path / f"{run.name}_hf"
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    card = (other / "README.md").read_text()
    assert "the mean of the checkpoints of steps 10, 12" in card
    assert "peak learning rate" in card, "the run's config goes along"
    assert call("export/export_hf.py", run, "--average", "99", "--output", tmp_path / "new") == 2
    assert "--last: 99, but" in capsys.readouterr().err


def test_explicit_steps_and_weights_and_the_moving_averages(tmp_path: Path, run: Path) -> None:
    output = tmp_path / "mean"
    request = AverageRequest(run=run, output=output, steps=(4, 10), shares=(1, 3), weights="ema")
    assert average_checkpoints(request).shares == (0.25, 0.75)
    one, other = weights_of(run, 4, "ema"), weights_of(run, 10, "ema")
    for name, tensor in load_file(output / "model.safetensors").items():
        assert torch.allclose(tensor, 0.25 * one[name] + 0.75 * other[name], atol=1e-7)


def test_one_checkpoint_is_its_own_mean_and_sums_do_not_round(tmp_path: Path) -> None:
    exact = torch.tensor([1e8, 1.0, -1e8])
    for number, value in enumerate(exact):
        save_file({"x": value[None]}, tmp_path / f"{number}.safetensors")
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    assert average_files(files, [1.0, 1.0, 1.0])["x"].item() == 1.0, "in fp32 the 1 would be lost"
    assert average_files(files[:1], [1.0])["x"].item() == 1e8


def test_the_mean_loads_everywhere_and_resumes_nowhere(tiny: Tiny, tmp_path: Path, run: Path) -> None:
    output = tmp_path / "mean"
    average_checkpoints(AverageRequest(run=run, output=output, last=2))
    loaded = load_encoder_weights(output)
    assert (loaded.layout, loaded.step, loaded.tokenizer) == ("checkpoint", 12, output / "tokenizer")
    assert len(load(output).fill_mask(["the [MASK] sees"])[0].masks) == 1
    done = export(ExportRequest(source=str(output), output=tmp_path / "exported"))
    assert done.step == 12
    assert "- weights: the mean of the checkpoints of steps 10, 12" in (done.folder / "README.md").read_text()
    started = tmp_path / "started"
    pretrain(tiny(started, f"model.init_from={output}", "trainer.max_steps=1"))
    assert f"initial weights from {output} (checkpoint layout after 12 steps)" in (started / "training.log").read_text()
    assert log_lines(started, "eval")[0]["loss"] < 5
    with pytest.raises(
        StartupError, match=r"mean of checkpoints, .* start a run from its weights with model.init_from"
    ):
        pretrain(tiny(tmp_path / "resumed", f"trainer.resume_from_checkpoint={output}"))


def test_what_it_refuses(tmp_path: Path, run: Path) -> None:
    output = tmp_path / "mean"

    def refuse(message: str, **settings: object) -> None:
        with pytest.raises(CheckpointError, match=message):
            average_checkpoints(AverageRequest(**{"run": run, "output": output, **settings}))  # type: ignore[arg-type]
        assert not output.exists()

    refuse(r"--last: 7, but .* has 6 whole checkpoint\(s\) \(steps: 2, 4, 6, 8, 10, 12\)", last=7)
    refuse(r"--last: 0", last=0)
    refuse(r"--last: 2 .*--steps", last=2, steps=(2, 4))
    refuse(r"--steps: 3: each must be", steps=(2, 3))
    refuse(r"--steps: 2, 2: each must be a different step", steps=(2, 2))
    refuse(r"--shares: 1, 2: write one number", steps=(2, 4, 6), shares=(1, 2))
    refuse(r"--shares: 0, 0: .* not all of them 0", steps=(2, 4), shares=(0, 0))
    refuse(r"--shares: nan, 1", steps=(2, 4), shares=(float("nan"), 1))
    refuse(r"--weights: 'swa' is unknown; write model or ema", last=2, weights="swa")
    with pytest.raises(CheckpointError, match=r"exists already"):
        average_checkpoints(AverageRequest(run=run, output=run, last=1))


def test_damaged_and_different_checkpoints_are_refused(tiny: Tiny, tmp_path: Path, run: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    file = copy / "checkpoints" / "10" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"checkpoints/10 is damaged: model.safetensors does not match its sha256"
    ):
        average_checkpoints(AverageRequest(run=copy, output=tmp_path / "mean", last=2))
    other = tmp_path / "other"
    deeper = ["model.num_hidden_layers=3", "trainer.max_steps=1"]
    pretrain(tiny(other, *deeper))
    shutil.rmtree(copy / "checkpoints" / "10")
    shutil.copytree(other / "checkpoints" / "1", copy / "checkpoints" / "1")
    with pytest.raises(CheckpointError, match=r"differ in model_config.json \(num_hidden_layers\): only checkpoints"):
        average_checkpoints(AverageRequest(run=copy, output=tmp_path / "mean", steps=(1, 12)))
    plain = tmp_path / "plain"
    pretrain(tiny(plain, "trainer.max_steps=1"))
    with pytest.raises(CheckpointError, match=r"ema.safetensors is missing: only runs with trainer.ema_decay"):
        average_checkpoints(AverageRequest(run=plain, output=tmp_path / "mean", last=1, weights="ema"))


def test_vectors_of_length_one_have_no_mean(tiny: Tiny, tmp_path: Path) -> None:
    given = ("model.ngpt=true", "optimizer.weight_decay=0", "scheduler.warmup_steps=0", "trainer.max_steps=2")
    pretrain(tiny(tmp_path / "run", *given, "trainer.save_steps=1", "trainer.eval_steps=0"))
    with pytest.raises(CheckpointError, match=r"whose vectors have length 1, .* take its last checkpoint as it is"):
        average_checkpoints(AverageRequest(run=tmp_path / "run", output=tmp_path / "mean", last=2))
    with pytest.raises(ConfigError, match=r"trainer.ema_decay: 0.9, but the mean of vectors of length 1 is shorter"):
        tiny(tmp_path / "other", *given, "trainer.ema_decay=0.9")
