"""A pipeline that fine-tunes what it pretrained."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from neobert.cli import EXIT_CODES
from neobert.commands import staged_run as pipeline
from neobert.commands.staged_run import PipelineError, load_pipeline, run_pipeline
from neobert.config.load import config_to_yaml, load_config
from neobert.config.schema import Config
from neobert.contrastive.finetune import finetune
from neobert.train.loop import pretrain


def test_the_contrastive_stage_starts_from_the_stage_before(
    tiny: Callable[..., Config],
    contrastive: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def run(words: Sequence[str]) -> int:
        calls.append(words[3])
        config = load_config(words[4], list(words[5:]))
        return EXIT_CODES[(pretrain if config.task == "pretraining" else finetune)(config).reason]

    monkeypatch.setattr(pipeline, "run_command", run)
    (tmp_path / "pretrain.yaml").write_text(config_to_yaml(tiny(tmp_path / "unused", "trainer.eval_steps=0")))
    # As a user writes it: nothing about the model, and no checkpoint, which is that of the stage before.
    random = yaml.safe_load(config_to_yaml(contrastive(tmp_path / "unused")))
    del random["model"], random["tokenizer"], random["contrastive"]
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(random))
    stages = [
        {"name": "base", "run": "pretrain", "config": str(tmp_path / "pretrain.yaml")},
        {"name": "pairs", "run": "contrastive", "config": str(tmp_path / "pairs.yaml")},
    ]
    file, out = tmp_path / "pipeline.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({"output": str(out), "overrides": ["trainer.max_steps=4"], "stages": stages}))
    assert run_pipeline(load_pipeline(file), dry_run=False) == 0
    assert calls == ["pretrain", "finetune"]
    assert f"initial weights from {out}/base/checkpoints/4 " in (out / "pairs" / "training.log").read_text()
    state = json.loads((out / "pairs" / "checkpoints" / "4" / "train_state.json").read_text())
    assert state["step"] == state["num_steps"] == 4

    calls.clear()
    assert run_pipeline(load_pipeline(file), dry_run=False) == 0
    assert calls == []
    assert run_pipeline(load_pipeline(file, ["trainer.max_steps=6"]), dry_run=True) == 0

    file.write_text(yaml.safe_dump({"output": str(out), "stages": stages[1:]}))
    with pytest.raises(PipelineError, match="leaves the encoder at random weights"):
        load_pipeline(file)
