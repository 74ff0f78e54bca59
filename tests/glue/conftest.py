"""A suite over small tasks, and a stand-in for fine-tuning."""

from pathlib import Path

import pytest
from task_folders import FakeTraining, MakeConfig, write_task

from neobert.config.load import parse_config
from neobert.config.schema import Config
from neobert.glue.glue_tasks import TASKS


@pytest.fixture(scope="session")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tasks, the diagnostic set with labels."""
    root = tmp_path_factory.mktemp("tasks")
    for name in TASKS:
        write_task(root, name)
    return root


@pytest.fixture
def make_config(tasks_folder: Path, tokenizer_folder: Path, tmp_path: Path) -> MakeConfig:
    """A suite with random weights of a small model: `make_config("glue.seeds=2", ...)`."""
    base = [
        "task=glue",
        "glue.allow_random_weights=true",
        f"glue.data_dir={tasks_folder}",
        "glue.tasks=[sst2, mrpc]",
        "glue.learning_rates=[1e-3, 1e-2, 3e-2]",
        "glue.batch_sizes=[4]",
        "glue.seeds=2",
        "model.hidden_size=32",
        "model.num_hidden_layers=1",
        "model.num_attention_heads=2",
        "model.intermediate_size=48",
        "model.max_position_embeddings=64",
        "dataset.max_seq_length=64",
        f"tokenizer.path={tokenizer_folder}",
        "scheduler.warmup_steps=0",
        "trainer.per_device_train_batch_size=4",
        "trainer.mixed_precision=no",
        "trainer.use_cpu=true",
        f"trainer.output_dir={tmp_path / 'out'}",
    ]

    def make(*overrides: str) -> Config:
        return parse_config("", [*base, *overrides])

    return make


@pytest.fixture
def fake() -> FakeTraining:
    return FakeTraining()
