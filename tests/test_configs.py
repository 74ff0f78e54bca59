"""Every shipped config loads, has a finite budget, and runs its first steps; every shipped plan holds such configs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from calls import call

from neobert.benchmark.experiment_plan import Workspace, build_job_config, check_plan, grid, load_plan
from neobert.config.load import config_to_yaml, load_config
from neobert.config.rules import warnings
from neobert.config.schema import Config
from neobert.train.loop import pretrain

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "configs" / "experiments"
PLANS = sorted(path for path in EXPERIMENTS.glob("*.yaml") if "\nruns:\n" in path.read_text())
PIPELINES = sorted((ROOT / "configs" / "pipelines").glob("*.yaml"))
LAUNCHERS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
"""Of accelerate; tests/train/test_processes.py starts with each."""

CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path not in [*PLANS, *PIPELINES, *LAUNCHERS])
PRETRAINING = [path for path in CONFIGS if path.parent.name not in ("contrastive", "finetuning", "glue")]

TINY = [
    "model.init_from=null",
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
    "dataset.text_column=null",
    "dataset.eval_samples=8",
    "tokenizer.name=null",
    "tokenizer.train=false",
    "tokenizer.vocab_size=null",
    "trainer.max_steps=2",
    "trainer.use_cpu=true",
    "trainer.torch_compile=false",
    "trainer.resume_from_checkpoint=null",
    "trainer.resume_allow=[]",
]
"""A size that trains in a moment, on local text."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_shipped_config_loads_and_is_portable(path: Path) -> None:
    config = load_config(path)
    trainer = config.trainer
    budgets = sum(x is not None for x in (trainer.max_steps, trainer.max_tokens, trainer.num_train_epochs))
    assert budgets == (path.parent.name != "glue")  # Whose grids have their epochs.
    assert config.model.attn_backend == "auto"
    assert not config.wandb.enabled
    assert trainer.output_dir.startswith("outputs/")
    assert warnings(config) == []


def two_micro_batches(config: Config) -> list[str]:
    """Overrides for a config that accumulates gradients: over two micro-batches, not over as many as fill a GPU."""
    trainer = config.trainer
    if trainer.global_batch_size is not None:
        assert isinstance(trainer.per_device_train_batch_size, int)
        assert trainer.global_batch_size % (2 * trainer.per_device_train_batch_size) == 0
        return [f"trainer.global_batch_size={2 * trainer.per_device_train_batch_size}"]
    accumulates = (trainer.gradient_accumulation_steps or 1) > 1
    return ["trainer.gradient_accumulation_steps=2"] if accumulates else []


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda p: p.stem)
def test_the_first_two_steps(path: Path, corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    local = [f"dataset.path={corpus}", f"tokenizer.path={tokenizer_folder}", f"trainer.output_dir={tmp_path}"]
    config = load_config(path, [*TINY, *local, *two_micro_batches(load_config(path))])
    assert pretrain(config).state.step == 2
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [0 < line["loss"] < 12 for line in lines if line["kind"] == "step"] == [True, True]


FOR_A_GPU = ("neobert_paper_", "pretrain_neobert")


def test_a_config_that_may_run_on_a_cpu_chooses_its_precision_there() -> None:
    """bf16 is several times slower than fp32 on a CPU without instructions for it."""
    on_gpu = [p for p in CONFIGS if p.stem.startswith(FOR_A_GPU) or p.stem.endswith("_gpu")]
    assert {p.stem for p in CONFIGS if load_config(p).trainer.mixed_precision != "auto"} == {p.stem for p in on_gpu}


VARIANTS = [(path, variant.name) for path in PLANS for variant in load_plan(path).variants]


@pytest.mark.parametrize(("path", "name"), VARIANTS, ids=lambda value: value if isinstance(value, str) else value.stem)
def test_the_first_two_steps_of_a_plan(
    path: Path, name: str, corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    plan = load_plan(path)
    overrides = (*TINY, f"dataset.path={corpus}", f"tokenizer.path={tokenizer_folder}")
    workspace = Workspace(output=tmp_path, data=corpus, overrides=overrides)
    (variant,) = (variant for variant in plan.variants if variant.name == name)
    config = build_job_config(plan, grid(variant)[0], workspace)
    # An entry may have steps of its own, so that all take the same time.
    assert pretrain(replace(config, trainer=replace(config.trainer, max_steps=2))).state.step == 2


def test_the_optimizers_are_compared_as_the_plan_says() -> None:
    plan = load_plan(EXPERIMENTS / "optimizers.yaml")
    assert [variant.name for variant in plan.variants] == ["adamw", "muonclip", "normuon", "ngpt"]
    assert all(len(variant.learning_rates) >= 3 for variant in plan.variants)
    assert plan.seeds_at_best == 1  # With seed 0 two seeds at the best rate.


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_the_configs_of_a_plan_load_and_differ(path: Path, tmp_path: Path) -> None:
    plan = load_plan(path)
    workspace = Workspace(output=tmp_path, data=tmp_path, overrides=(f"dataset.path={tmp_path}",))
    check_plan(plan, workspace)
    configs = [build_job_config(plan, job, workspace) for variant in plan.variants for job in grid(variant)]
    assert [warnings(config) for config in configs] == [[]] * len(configs)
    assert len({config_to_yaml(config).replace(config.trainer.output_dir, "") for config in configs}) == len(configs)


def test_the_quickstart_sets_no_key_that_follows_from_others() -> None:
    text = (ROOT / "configs/pretraining/quickstart.yaml").read_text()
    config = load_config(ROOT / "configs/pretraining/quickstart.yaml")
    assert "text_column" not in text
    assert (config.model.vocab_size, config.tokenizer.max_length, config.datacollator.max_length) == (None, None, None)
    assert config.dataset.name == "python_stdlib"
    assert config.trainer.resume_from_checkpoint == "latest"


@pytest.mark.parametrize("name", ["adamw", "adam", "stable_adamw", "muonclip"])
def test_the_optimizer_of_the_quickstart_is_changed_by_its_name_alone(name: str) -> None:
    """No setting of the file belongs to one optimizer only: examples change it on the command line."""
    config = load_config(ROOT / "configs/pretraining/quickstart.yaml", [f"optimizer.name={name}"])
    assert config.optimizer.name == name


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


def test_the_config_of_the_training_guide_has_its_facts() -> None:
    config = load_config(ROOT / "configs/pretraining/pretrain_neobert100m_smollm2data_muonclip.yaml")
    assert config.dataset.streaming is True
    assert config.dataset.name == "EleutherAI/SmolLM2-1.7B-stage-4-100B"
    assert config.dataset.max_seq_length == 1024
    assert config.tokenizer.name == "BEE-spoke-data/wordpiece-tokenizer-32k-en_code-msp"
    assert config.trainer.max_steps == 100_000
    assert config.trainer.output_dir == "outputs/neobert-100m-wordpc_msp_32k_tok-muonclip"
    assert config.trainer.save_steps < 69_420, "there is a checkpoint before the crash that the guide recovers from"
    assert config.optimizer.name == "muonclip"
    assert config.optimizer.muon_config.enable_clipping
    assert (config.optimizer.muon_config.clipping_threshold, config.optimizer.muon_config.clipping_interval) == (
        50.0,
        10,
    )


def test_the_smollm2_configs_differ_where_their_names_do() -> None:
    names = ("neobert100m_smollm2data", "neobert250m_smollm2data", "neobert100m_smollm2data_muonclip")
    small, large, muon = (load_config(ROOT / f"configs/pretraining/pretrain_{name}.yaml") for name in names)
    assert (small.model.num_hidden_layers, large.model.num_hidden_layers) == (12, 28)
    assert small.dataset == large.dataset == muon.dataset
    assert small.optimizer == large.optimizer
    assert (small.scheduler, small.trainer.max_steps, small.seed) == (muon.scheduler, muon.trainer.max_steps, 69)
    rows = {
        config.trainer.per_device_train_batch_size * (config.trainer.gradient_accumulation_steps or 1)
        for config in (small, large, muon)
    }
    assert rows == {64}


CORPORA = sorted((ROOT / "configs/pretraining/corpora").glob("*.yaml"))


def test_every_corpus_has_a_small_and_a_large_preset() -> None:
    names = ("mixed", "openwebtext", "tinystories", "wikipedia", "wikitext103", "wikitext2")
    assert [path.stem for path in CORPORA] == [f"{name}_{size}" for name in names for size in ("gpu", "local")]
    configs = {path.stem: load_config(path) for path in CORPORA}
    assert all(config.trainer.output_dir == f"outputs/{config.model.name}" for config in configs.values())
    assert (configs["wikipedia_local"].dataset.name, configs["wikipedia_local"].dataset.config) == (
        "wikimedia/wikipedia",
        "20231101.en",
    )
    mixed = configs["mixed_gpu"].dataset.mixture
    alone = {config.dataset.name for name, config in configs.items() if name.endswith("_gpu")} - {None}
    assert {source.name for source in mixed} == alone


@pytest.mark.parametrize("size", ["local", "gpu"])
def test_presets_of_one_size_differ_in_their_data_and_budget_only(size: str) -> None:
    own = ("name:", "config:", "revision:", "mixture:", "text_column:", "max_tokens:", "output_dir:")
    rest = set()
    for path in CORPORA:
        if path.stem.endswith(size):
            lines = config_to_yaml(load_config(path)).splitlines()
            rest.add("\n".join(line for line in lines if not line.strip().startswith(own)))
    assert len(rest) == 1


def test_the_two_stages_of_the_paper_follow_each_other(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/recipes.md says: train, write the long documents, continue with the mixture; small, on local text."""
    monkeypatch.chdir(tmp_path)
    dropped = ("dataset.mixture", "dataset.max_seq_length", "trainer.resume", "trainer.max_steps", "dataset.name")
    small = [word for word in TINY if not word.startswith(dropped)]
    small += [f"tokenizer.path={tokenizer_folder}", "trainer.per_device_train_batch_size=2"]
    first, second = (ROOT / f"configs/pretraining/neobert_paper_{length}.yaml" for length in (1024, 4096))
    stage_1 = [*small, f"dataset.path={corpus}", "dataset.max_seq_length=32", "trainer.max_steps=2"]
    assert pretrain(load_config(first, [*stage_1, "trainer.global_batch_size=8"])).state.step == 2
    words = ["--checkpoint", "outputs/neobert_paper_1024", "--max-length", "64", "--max-length", "128"]
    settings = [f"--{word}" for word in stage_1[:-1]]
    assert call("pretraining/longer_seq.py", first, *settings, *words, "--prepare-only") == 0
    folders = [f"{{path: tokenized_data/neobert_paper_1024-long/{length}, weight: 0.4}}" for length in (64, 128)]
    mixture = ", ".join([f"{{path: {corpus}, weight: 0.2}}", *folders])
    stage_2 = [*small, f"dataset.mixture=[{mixture}]", "dataset.max_seq_length=128", "trainer.max_steps=4"]
    config = load_config(second, [*stage_2, "trainer.global_batch_size=4"])
    assert config.trainer.resume_from_checkpoint == "outputs/neobert_paper_1024"
    assert pretrain(config).state.step == 4
    steps = [json.loads(line) for line in (tmp_path / "outputs/neobert_paper_4096/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["kind"] == "step"] == [3, 4]


def test_the_budgets_of_the_paper() -> None:
    first, second = (load_config(ROOT / f"configs/pretraining/neobert_paper_{n}.yaml") for n in (1024, 4096))
    for config in (first, second):
        assert config.trainer.global_batch_size is not None
        assert config.trainer.global_batch_size * config.dataset.max_seq_length == 2**21
        assert (config.model.hidden_size, config.model.num_hidden_layers) == (768, 28)
        assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay) == (6e-4, (0.9, 0.95), 0.1)
        assert (config.datacollator.mlm_probability, config.datacollator.mask_all) == (0.2, True)
    assert (first.trainer.max_steps, second.trainer.max_steps) == (1_000_000, 1_050_000)
    assert [source.weight for source in second.dataset.mixture] == [0.2, 0.4, 0.4]
