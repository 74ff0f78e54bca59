"""Every shipped config loads, has a finite budget, and runs its first steps; every shipped plan holds such configs."""

import json
from pathlib import Path

import pytest

from neobert.benchmark.experiments import Place, build_job_config, check_plan, grid, load_plan
from neobert.config.load import config_to_yaml, load_config
from neobert.config.validate import warnings
from neobert.train.loop import pretrain

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "configs" / "experiments"
PLANS = sorted(path for path in EXPERIMENTS.glob("*.yaml") if "\nruns:\n" in path.read_text())
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path not in PLANS)

TINY = [
    "model.hidden_size=16",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.intermediate_size=24",
    "dataset.name=null",
    "dataset.config=null",
    "dataset.mixture=[]",
    "dataset.max_seq_length=32",
    "dataset.eval_split=null",
    "dataset.train_split=null",
    "dataset.eval_samples=8",
    "tokenizer.name=null",
    "tokenizer.train=false",
    "tokenizer.vocab_size=null",
    "trainer.max_steps=2",
    "trainer.use_cpu=true",
    "trainer.torch_compile=false",
]
"""A size that trains in a moment, on local text."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_shipped_config_loads_and_is_portable(path: Path) -> None:
    config = load_config(path)
    trainer = config.trainer
    assert sum(x is not None for x in (trainer.max_steps, trainer.max_tokens, trainer.num_train_epochs)) == 1
    assert config.model.attn_backend == "auto"
    assert not config.wandb.enabled
    assert trainer.output_dir.startswith("outputs/")
    assert warnings(config) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_first_two_steps(path: Path, corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    local = [f"dataset.path={corpus}", f"tokenizer.path={tokenizer_folder}", f"trainer.output_dir={tmp_path}"]
    config = load_config(path, [*TINY, *local, "trainer.overwrite_output_dir=true"])
    assert pretrain(config).state.step == 2
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [0 < line["loss"] < 12 for line in lines if line["kind"] == "step"] == [True, True]


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_the_configs_of_a_plan_load_and_differ(path: Path, tmp_path: Path) -> None:
    plan = load_plan(path)
    place = Place(output=tmp_path, data=tmp_path, overrides=(f"dataset.path={tmp_path}",))
    check_plan(plan, place)
    configs = [build_job_config(plan, job, place) for variant in plan.variants for job in grid(variant)]
    assert [warnings(config) for config in configs] == [[]] * len(configs)
    assert len({config_to_yaml(config).replace(config.trainer.output_dir, "") for config in configs}) == len(configs)


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
