"""A continued run equals the uninterrupted one, to the last bit."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calls import call
from children import fork, kill, wait_until
from records import exact_steps, log_lines
from safetensors.torch import load_file

from neobert.config.load import config_to_yaml, load_config
from neobert.config.schema import Config
from neobert.errors import DataError, StartupError
from neobert.train import loop
from neobert.train.loop import pretrain

ROOT = Path(__file__).parents[2]
Tiny = Callable[..., Config]

VARIANTS = {
    "streamed, packed, dropout, accumulation": ["model.dropout_prob=0.1", "trainer.gradient_accumulation_steps=2"],
    "bf16, no threads": ["trainer.mixed_precision=bf16", "model.dropout_prob=0.1", "dataset.num_workers=0"],
    "indexed": ["dataset.streaming=false", "dataset.num_workers=3"],
    "one document a row": ["datacollator.pack_sequences=false", "model.dropout_prob=0.1"],
    "normalised": ["model.ngpt=true", "optimizer.weight_decay=0", "trainer.mixed_precision=bf16"],
    "more norms and a bias": ["model.qk_norm=true", "model.embedding_norm=true", "model.decoder_bias=true"],
    "batches that are not full": ["trainer.enforce_full_packed_batches=false"],
    "muonclip, clipping": [
        "optimizer.name=muonclip",
        "optimizer.muon_config.clipping_interval=3",
        "optimizer.muon_config.clipping_threshold=0.02",
        "trainer.gradient_accumulation_steps=2",
        "model.dropout_prob=0.1",
    ],
    "normuon, bf16, groups": [
        "optimizer.name=normuon",
        "optimizer.groups.matrices.lr=2e-2",
        "optimizer.groups.vectors.weight_decay=0.1",
        "optimizer.decoupled_weight_decay=true",
        "trainer.mixed_precision=bf16",
        "trainer.gradient_checkpointing=true",
    ],
    "stable_adamw": ["optimizer.name=stable_adamw"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_the_uninterrupted_one(tiny: Tiny, tmp_path: Path, variant: str) -> None:
    whole = tmp_path / "whole"
    pretrain(tiny(whole, *VARIANTS[variant]))
    assert [x["step"] for x in log_lines(whole, "step")] == list(range(1, 13))
    for step in (4, 8):
        resumed = tmp_path / f"resumed-{step}"
        resume = f"trainer.resume_from_checkpoint={whole / 'checkpoints' / str(step)}"
        result = pretrain(tiny(resumed, *VARIANTS[variant], resume))
        assert result.state.step == 12
        assert exact_steps(resumed) == exact_steps(whole, after=step)
    last = [load_file(folder / "checkpoints/12/model.safetensors") for folder in (whole, resumed)]
    assert all(bool((last[0][name] == last[1][name]).all()) for name in last[0])


def test_kill_9_at_a_random_step_and_resume_with_latest(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["trainer.max_steps=18", "trainer.logging_steps=1", "trainer.save_steps=3", "model.dropout_prob=0.1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    config_file = tmp_path / "run.yaml"
    config_file.write_text(config_to_yaml(tiny(killed, *overrides)))
    pretrain(tiny(whole, *overrides))
    kill_after, log = random.Random(7).randint(5, 12), killed / "log.jsonl"
    # It does not end by itself while the kill is on its way, however busy the machine is.
    monkeypatch.setenv("NEOBERT_FAULT", "step.done@15:sleep60")
    victim = fork(lambda: int(call("pretraining/pretrain.py", config_file)), tmp_path / "printed")
    wait_until(lambda: log.exists() and len(log_lines_so_far(killed)) >= kill_after, victim, tmp_path / "printed")
    kill(victim)
    monkeypatch.delenv("NEOBERT_FAULT")
    saved = max(int(p.name) for p in (killed / "checkpoints").iterdir() if p.name.isdecimal())
    assert saved < 18, "the run was over before it was killed"
    capsys.readouterr()
    assert call("pretraining/pretrain.py", config_file, "--trainer.resume_from_checkpoint", "latest") == 0
    assert f"resuming from {killed}/checkpoints/{saved}/" in capsys.readouterr().out.splitlines()
    assert exact_steps(killed) == exact_steps(whole)


def log_lines_so_far(output_dir: Path) -> list[str]:
    return [x for x in (output_dir / "log.jsonl").read_text().splitlines() if '"step"' in x and '"loss_hex"' in x]


def test_latest_without_a_checkpoint_starts_fresh_and_says_so(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "log.jsonl").write_text('{"kind": "eval", "step": 0}\n{"kind": "step", "step": 1, "lo')  # torn by a kill
    result = pretrain(tiny(out, "trainer.resume_from_checkpoint=latest", "trainer.max_steps=2"))
    assert result.state.step == 2
    assert [(x["kind"], x["step"]) for x in map(json.loads, (out / "log.jsonl").read_text().splitlines())] == [
        ("eval", 0),
        ("weights", 0),
        ("step", 1),
        ("step", 2),
        ("log", 2),
        ("eval", 2),
        ("weights", 2),
    ]
    assert f"no checkpoint in {out}/checkpoints/ yet: starting fresh" in capsys.readouterr().out


def test_a_finished_run_has_nothing_left_to_do_and_can_be_extended(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, "trainer.max_steps=3"))
    before = (out / "log.jsonl").read_text()
    result = pretrain(tiny(out, "trainer.max_steps=3", "trainer.resume_from_checkpoint=true"))
    assert result.reason == "complete"
    assert "nothing left to do: step 3 of 3" in capsys.readouterr().out
    assert (out / "log.jsonl").read_text() == before
    longer = pretrain(tiny(out, "trainer.max_steps=5", "trainer.resume_from_checkpoint=latest"))
    assert longer.state.step == 5
    assert [x["step"] for x in log_lines(out, "step")] == [1, 2, 3, 4, 5]


def test_a_used_folder_is_an_error_that_names_both_ways_out(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, "trainer.max_steps=2"))
    with pytest.raises(StartupError, match=r"resume_from_checkpoint: latest.*overwrite_output_dir: true"):
        pretrain(tiny(out, "trainer.max_steps=2"))
    pretrain(tiny(out, "trainer.max_steps=1", "trainer.overwrite_output_dir=true"))
    assert [x["step"] for x in log_lines(out, "step")] == [1]
    assert [x["step"] for x in log_lines(tmp_path / "run.old-1", "step")] == [1, 2], "the old run is kept"


def test_a_start_that_failed_is_no_run(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(DataError, match=r"dataset.path: .*nowhere.* does not exist"):
        pretrain(tiny(out, f"dataset.path={tmp_path / 'nowhere'}"))
    assert pretrain(tiny(out, "trainer.max_steps=1")).state.step == 1


def test_messages_of_a_resume_that_cannot_be(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out, "trainer.max_steps=4"))
    with pytest.raises(StartupError, match=r"resume_from_checkpoint: 3, but .*steps there: 4"):
        pretrain(tiny(out, "trainer.resume_from_checkpoint=3"))
    with pytest.raises(StartupError, match="neither a checkpoint folder nor a run folder"):
        pretrain(tiny(out, f"trainer.resume_from_checkpoint={tmp_path / 'nowhere'}"))
    with pytest.raises(StartupError, match=r"model.num_hidden_layers +fixed +2 -> 3"):
        pretrain(tiny(out, "trainer.resume_from_checkpoint=latest", "model.num_hidden_layers=3"))
    with pytest.raises(StartupError, match=r"4 rows a step.*would use 8.*gradient_accumulation_steps: 2"):
        pretrain(
            tiny(
                out,
                "trainer.resume_from_checkpoint=latest",
                "trainer.per_device_train_batch_size=2",
                "trainer.gradient_accumulation_steps=4",
            )
        )
    torn = out / "checkpoints" / "4" / "train_state.json"
    torn.write_text(torn.read_text()[:20])
    with pytest.raises(StartupError, match=r"4 skipped: train_state.json is 20 bytes, manifest.json says"):
        pretrain(tiny(out, "trainer.resume_from_checkpoint=latest"))


def test_an_older_step_becomes_the_new_branch(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(tiny(out))
    steps = exact_steps(out)
    pretrain(tiny(out, "trainer.resume_from_checkpoint=4", "trainer.max_steps=6", "scheduler.total_steps=12"))
    names = {p.name for p in (out / "checkpoints").iterdir()}
    assert names == {"4", "6", ".superseded-8", ".superseded-12"}
    assert exact_steps(out) == steps[:6]


def test_a_switched_source_starts_at_its_first_row_and_a_changed_one_stops(
    tiny: Tiny, tmp_path: Path, corpus: Path
) -> None:
    out, copy = tmp_path / "run", tmp_path / "copy"
    shutil.copytree(corpus, copy)
    path = f"dataset.path={copy}"
    pretrain(tiny(out, path, "trainer.max_steps=4"))
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({"text": f"another text, number {i}, about nothing"}) + "\n" for i in range(200))
    )
    pretrain(tiny(out, f"dataset.path={other}", "trainer.max_steps=6", "trainer.resume_from_checkpoint=latest"))
    events = [json.loads(x) for x in (out / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events if e["step"] == 4][-2:] == ["source_switched", "resumed"]
    with other.open("a") as handle:
        handle.write(json.dumps({"text": "one more line was added to this file"}) + "\n")
    with pytest.raises(StartupError, match="the data under this run changed"):
        pretrain(tiny(out, f"dataset.path={other}", "trainer.max_steps=8", "trainer.resume_from_checkpoint=latest"))


def test_a_checkpoint_has_the_documented_files_and_its_config_loads_back_equal(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tiny(out, "trainer.max_steps=2", 'trainer.fill_mask_texts=["the [MASK] sees"]')
    pretrain(config)
    checkpoint = out / "checkpoints" / "2"
    names = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    documented = {
        "model.safetensors",
        "model_config.json",
        "optimizer.bin",
        "scheduler.bin",
        "random_states_0.pkl",
        "custom_checkpoint_0.pkl",
        "train_state.json",
        "config.yaml",
        "tokenizer_info.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    }
    assert documented <= names
    assert load_config(checkpoint / "config.yaml") == config
    assert load_config(out / "config.yaml") == config


def test_old_checkpoints_are_deleted_and_other_names_left_alone(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "checkpoints" / "best").mkdir(parents=True)
    config = tiny(
        out,
        "trainer.save_steps=1",
        "trainer.save_total_limit=2",
        "trainer.max_steps=5",
        "trainer.resume_from_checkpoint=latest",
    )
    pretrain(config)
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"4", "5", "best"}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_step_has_its_own_dropout_mask(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    """The same rows and the same weights in every step: losses differ by the dropout alone, and by none without it."""
    real, first, losses = loop.train_step, [], []

    def train_step(model: Any, optimizer: Any, batches: Any, **more: Any) -> Any:
        first[:] = first or [batches]
        result = real(model, optimizer, first[0], **more | {"lr": 0.0, "scale": 1.0})
        losses.append(result.loss_sum.item())
        return result

    monkeypatch.setattr(loop, "train_step", train_step)
    for name in ("one", "other"):
        pretrain(tiny(tmp_path / name, f"model.dropout_prob={dropout}", "trainer.max_steps=6", "trainer.save_steps=0"))
    assert losses[:6] == losses[6:], "the masks are functions of the step"
    assert len({round(loss, 3) for loss in losses}) == (6 if dropout else 1)
