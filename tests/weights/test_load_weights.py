"""Where weights come from: checkpoints and runs of ours and of the fork, folders of transformers, the hub."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from neobert_models import LONGEST, SIZES, hub_config, make_tensors
from safetensors.torch import load_file, save_file

import neobert.weights.encoder_weights as load_module
from neobert.config.schema import Config
from neobert.train.loop import pretrain
from neobert.weights.describe import WeightsError
from neobert.weights.encoder_weights import load_encoder_weights

Tiny = Callable[..., Config]


@pytest.fixture(scope="module")
def run_folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("loaded") / "run"
    pretrain(tiny(out, "trainer.max_steps=2", "trainer.save_steps=1", "trainer.eval_steps=0"))
    return out


def make_hub_folder(folder: Path, **more: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hub_config(**more)))
    save_file(make_tensors("hub"), folder / "model.safetensors")
    return folder


def make_fork_run(folder: Path) -> Path:
    for step in (900, 1000):
        checkpoint = folder / "checkpoints" / str(step)
        (checkpoint / "tokenizer").mkdir(parents=True)
        (checkpoint / "tokenizer" / "tokenizer.json").write_text("{}")
        tensors = make_tensors("fork", seed=step)
        tensors["decoder.weight"] = tensors["model.encoder.weight"].clone()
        save_file(tensors, checkpoint / "model.safetensors")
        section = {**SIZES, "vocab_size": 7, "max_position_embeddings": LONGEST, "norm_eps": "1e-5", "ngpt": False}
        (checkpoint / "config.yaml").write_text(yaml.safe_dump({"task": "pretraining", "model": section}))
    (folder / "checkpoints" / "2000").mkdir()
    return folder


def test_a_run_a_checkpoint_and_its_tensors(run_folder: Path) -> None:
    newest = load_encoder_weights(run_folder)
    assert (newest.layout, newest.step, newest.folder) == ("checkpoint", 2, run_folder / "checkpoints" / "2")
    assert newest.tokenizer == run_folder / "checkpoints" / "2" / "tokenizer"
    saved = load_file(run_folder / "checkpoints" / "1" / "model.safetensors")
    first = load_encoder_weights(str(run_folder / "checkpoints" / "1"))
    assert first.step == 1
    assert set(first.tensors) == set(saved)
    assert all(torch.equal(first.tensors[name], saved[name]) for name in saved)


def test_a_run_of_the_fork_gives_weights_and_step(tmp_path: Path) -> None:
    run = make_fork_run(tmp_path / "run")
    for path in (run, run / "checkpoints" / "1000"):
        loaded = load_encoder_weights(path)
        assert (loaded.layout, loaded.step) == ("neobert_fork", 1000)
        assert loaded.tokenizer == run / "checkpoints" / "1000" / "tokenizer"
        assert (loaded.config.vocab_size, loaded.config.tie_word_embeddings) == (30, True)


@pytest.mark.parametrize("form", ["safetensors", "shards", "pickle"])
def test_a_clone_of_a_hub_model_in_every_file_form(tmp_path: Path, form: str) -> None:
    folder = make_hub_folder(tmp_path / "NeoBERT")
    tensors = make_tensors("hub")
    if form == "shards":
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
        for part, members in parts.items():
            save_file({name: tensors[name] for name in members}, folder / part)
        weight_map = {name: part for part, members in parts.items() for name in members}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    elif form == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    loaded = load_encoder_weights(folder)
    assert (loaded.layout, loaded.step, loaded.tokenizer) == ("neobert", None, None)
    assert torch.equal(loaded.tensors["encoder.embedding.weight"], tensors["model.encoder.weight"])
    assert loaded.config.max_position_embeddings == LONGEST


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/should-never-exist-neobert"),))


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    folder = make_hub_folder(tmp_path / "NeoBERT")
    (folder / "model.safetensors").unlink()
    torch.save({"model.encoder.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="NeoBERT") as caught:
        load_encoder_weights(folder)
    assert "pytorch_model.bin cannot be read as tensors (it names" in str(caught.value)
    assert "'model.safetensors')\"" in str(caught.value), "the way out is a command"
    assert len(str(caught.value).splitlines()) == 1, "torch's advice has many lines"
    assert not Path("/tmp/should-never-exist-neobert").exists()


def test_a_name_of_the_hub_is_fetched_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls = make_hub_folder(tmp_path / "snapshot"), []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision, allow_patterns[-1]))
        return str(folder)

    monkeypatch.setattr(load_module, "snapshot_download", download)
    assert load_encoder_weights("chandar-lab/NeoBERT").layout == "neobert"
    assert load_encoder_weights("chandar-lab/NeoBERT@v2/x").layout == "neobert"
    assert calls == [("chandar-lab/NeoBERT", None, "*.safetensors"), ("chandar-lab/NeoBERT", "v2/x", "*.safetensors")]
    torch.save(make_tensors("hub"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load_encoder_weights("chandar-lab/NeoBERT").layout == "neobert"
    assert [call[2] for call in calls[2:]] == ["*.safetensors", "*.bin"], "pickles only where there is nothing else"


def test_the_hub_out_of_reach_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real code path of the library, offline."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match=r"nobody/nothing is no folder, and the hub did not .*[^.]\. Check the"):
        load_encoder_weights("nobody/nothing")


def test_errors_name_the_value_and_the_remedy(tmp_path: Path) -> None:
    for nowhere in ("/nowhere/at/all", "./nowhere", "../nowhere"):
        with pytest.raises(WeightsError, match=rf"^{re.escape(nowhere)} is no folder: give a run"):
            load_encoder_weights(nowhere)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"empty holds no weights: give a run folder"):
        load_encoder_weights(tmp_path / "empty")
    other = make_hub_folder(tmp_path / "other", model_type="gpt2")
    with pytest.raises(WeightsError, match=r"model_type 'gpt2': its layout is not known; known are eurobert, llama"):
        load_encoder_weights(other)
    bare = make_hub_folder(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"bare: there is neither model.safetensors nor"):
        load_encoder_weights(bare)
    (bare / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(WeightsError, match="bare: "):
        load_encoder_weights(bare)
    fork = make_fork_run(tmp_path / "fork") / "checkpoints" / "900"
    (fork / "config.yaml").write_text("trainer: {max_steps: 3}")
    with pytest.raises(WeightsError, match=r"config.yaml has no section `model`"):
        load_encoder_weights(fork)
    shutil.rmtree(fork)
