"""Every shipped config loads, has a finite budget, and runs its first steps."""

from pathlib import Path

import pytest

from neobert.config.load import config_to_yaml, load_config
from neobert.config.validate import warnings

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "pipelines")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_shipped_config_loads_and_is_portable(path: Path) -> None:
    config = load_config(path)
    trainer = config.trainer
    assert sum(x is not None for x in (trainer.max_steps, trainer.max_tokens, trainer.num_train_epochs)) == 1
    assert config.model.attn_backend == "auto"
    assert not config.wandb.enabled
    assert trainer.output_dir.startswith("outputs/")
    assert warnings(config) == []


def test_the_quickstart_sets_no_key_that_follows_from_others() -> None:
    text = (ROOT / "configs/pretraining/quickstart.yaml").read_text()
    config = load_config(ROOT / "configs/pretraining/quickstart.yaml")
    assert "text_column" not in text
    assert (config.model.vocab_size, config.tokenizer.max_length, config.datacollator.max_length) == (None, None, None)
    assert config.dataset.name == "python_stdlib"
    assert config.trainer.resume_from_checkpoint == "latest"


def test_the_paper_config_names_the_paper_setting() -> None:
    config = load_config(ROOT / "configs/pretraining/pretrain_neobert.yaml")
    assert (config.dataset.name, config.dataset.config, config.dataset.streaming) == (
        "wikimedia/wikipedia",
        "20231101.en",
        True,
    )
    assert config.trainer.output_dir == "outputs/neobert_pretrain"
    assert (config.model.num_hidden_layers, config.model.hidden_size) == (28, 768)
    assert "vocab_size: null" in config_to_yaml(config)
