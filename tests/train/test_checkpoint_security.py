"""A checkpoint is data: it runs no code, decides nothing about code, and holds no secret."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
import yaml
from rewriting import rewrite_manifest

from neobert.config.load import load_config
from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.inference.model import load
from neobert.train.loop import pretrain

Tiny = Callable[..., Config]


class Planted:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.fixture
def trained(tiny: Tiny, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    pretrain(tiny(out, "trainer.max_steps=2"))
    return out


@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"])
def test_code_in_a_pickle_is_never_run(tiny: Tiny, trained: Path, tmp_path: Path, name: str) -> None:
    checkpoint, proof = trained / "checkpoints" / "2", tmp_path / "proof"
    (checkpoint / name).write_bytes(pickle.dumps(Planted(proof), protocol=2))
    assert pickle.loads((checkpoint / name).read_bytes()) == 0  # The trap works ...
    proof.unlink()
    more = ["trainer.max_steps=3", f"trainer.resume_from_checkpoint={checkpoint}"]
    with pytest.raises(StartupError, match=f"is damaged: {name} "):
        pretrain(tiny(trained, *more))
    rewrite_manifest(checkpoint)  # ... and is as harmless to somebody who trusts the manifest.
    with pytest.raises(StartupError, match=rf"{name} is damaged, or holds code that is never run") as caught:
        pretrain(tiny(trained, *more))
    assert "it names posix.system, which could be any code" in str(caught.value)
    assert f"model.init_from: {checkpoint}" in str(caught.value)
    assert "weights_only" not in str(caught.value), "that advice of torch would run it"
    assert not proof.exists()


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_random_states_that_are_damaged_are_an_error(tiny: Tiny, trained: Path, damage: str) -> None:
    path = trained / "checkpoints" / "2" / "random_states_0.pkl"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    more = ["trainer.max_steps=3", f"trainer.resume_from_checkpoint={path.parent}"]
    with pytest.raises(StartupError, match=r"is damaged: random_states_0.pkl is (missing|100 bytes)"):
        pretrain(tiny(trained, *more))
    (path.parent / "manifest.json").unlink()
    with pytest.raises(StartupError, match=r"random_states_0.pkl is (missing|damaged)"):
        pretrain(tiny(trained, *more))


def test_files_of_two_checkpoints_are_noticed_without_a_manifest(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, "trainer.max_steps=8"))
    four, eight = out / "checkpoints" / "4", out / "checkpoints" / "8"
    (eight / "scheduler.bin").write_bytes((four / "scheduler.bin").read_bytes())
    (eight / "manifest.json").unlink()
    with pytest.raises(StartupError, match=r"scheduler.bin is of step 4, train_state.json of step 8"):
        pretrain(tiny(out, "trainer.max_steps=9", "trainer.resume_from_checkpoint=8"))


def test_a_checkpoint_without_a_manifest_continues_under_its_name_with_a_warning(
    tiny: Tiny, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As written by versions that had no manifest, with the fields they had."""
    checkpoint = trained / "checkpoints" / "2"
    (checkpoint / "manifest.json").unlink()
    state = json.loads((checkpoint / "train_state.json").read_text())
    for name in ("eval_loss", "special_ids", "optimizer_groups", "config_digest", "versions", "lineage"):
        del state[name]
    (checkpoint / "train_state.json").write_text(json.dumps(state))
    with pytest.raises(StartupError, match=r"2 skipped: it has no manifest.json"):
        pretrain(tiny(trained, "trainer.max_steps=3", "trainer.resume_from_checkpoint=latest"))
    assert pretrain(tiny(trained, "trainer.max_steps=3", "trainer.resume_from_checkpoint=2")).state.step == 3
    assert "warning: " in (printed := capsys.readouterr().out)
    assert "has no manifest.json, so nothing shows whether its files are whole" in printed
    with pytest.warns(UserWarning, match=r"2 skipped|no manifest"):
        load(checkpoint)


def test_remote_code_is_this_starts_decision_alone(tiny: Tiny, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = trained / "checkpoints" / "2"
    config = checkpoint / "config.yaml"
    config.write_text(config.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    assert yaml.safe_load(config.read_text())["tokenizer"]["trust_remote_code"] is True
    rewrite_manifest(checkpoint)
    asked = []
    real = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        transformers.AutoTokenizer,
        "from_pretrained",
        lambda *args, trust_remote_code, **more: (asked.append(trust_remote_code), real(*args, **more))[1],
    )
    resume = ["trainer.max_steps=3", "trainer.resume_from_checkpoint=latest"]
    pretrain(tiny(trained, *resume))
    load(checkpoint)
    assert asked
    assert not any(asked), "what the checkpoint says does not count"
    pretrain(tiny(trained, "trainer.max_steps=4", resume[1], "tokenizer.trust_remote_code=true"))
    assert asked[-1] is True


def test_no_saved_file_holds_a_secret(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdefghij")
    out = tmp_path / "run"
    secret = ["wandb.entity=https://user:pw1234@host", "wandb.tags=['api_key=zzz999']"]
    pretrain(tiny(out, "trainer.max_steps=2", *secret))
    files = [p for p in out.rglob("*") if p.is_file() and p.suffix in (".yaml", ".json", ".jsonl", ".bin", ".pkl")]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert b"pw1234" not in content, path
        assert b"zzz999" not in content, path
        assert b"hf_0123456789" not in content, path
    # The scrubbed config is compared with the scrubbed one of the next start: no false difference.
    resume = ["trainer.max_steps=3", "trainer.resume_from_checkpoint=latest"]
    assert pretrain(tiny(out, *resume, *secret)).state.step == 3
    table = (out / "training.log").read_text().split("(checkpoint -> now):\n")[1].splitlines()
    assert table[0].split() == ["trainer.max_steps", "schedule", "2", "->", "3"]
    assert not table[1].startswith("  "), "and nothing else"


def test_sentences_to_complete_are_saved_as_they_are(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tiny(out, "trainer.max_steps=1", "trainer.fill_mask_texts=['the token: [MASK]']")
    pretrain(config)
    assert load_config(out / "config.yaml") == config
