"""Keys of `glue`: what is refused, and how files of other NeoBERT code are read."""

from pathlib import Path

import pytest
from task_folders import MakeConfig

from neobert.commands.glue_commands import parse_glue
from neobert.config.load import ConfigError, config_to_yaml, load_config, parse_config
from neobert.config.migrate import migrate
from neobert.errors import CallError
from neobert.glue.glue_tasks import TASKS


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["glue.allow_random_weights=false"], "glue.model: null; name a run"),
        (["glue.model=x"], "glue.allow_random_weights: true is set beside glue.model = x"),
        (["optimizer.lr=1e-3"], "optimizer.lr: 0.001 is not read with task: glue, write glue.learning_rates"),
        (["trainer.eval_steps=7"], "trainer.eval_steps: 7 is not read with task: glue"),
        (["dataset.path=x"], r"dataset.path: .* glue.data_dir is the folder"),
        (["finetune.metric=f1"], "finetune.metric: f1 is not read with task: glue"),
        (["trainer.max_steps=1", "trainer.num_train_epochs=1"], "trainer.max_steps: set exactly one of"),
        (["glue.num_labels=2"], "glue.num_labels: follows from the task: remove it"),
        (["glue.task_name=cola"], "glue.task_name: is written glue.tasks here"),
        (["glue.pretrained_checkpoint=5"], "glue.pretrained_checkpoint: is a part of glue.model"),
        (["glue.seeds=0"], "glue.seeds: 0 must be at least 1"),
    ],
)
def test_what_a_suite_does_not_read_is_refused(make_config: MakeConfig, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(*overrides)


def test_keys_of_the_suite_are_of_no_other_task() -> None:
    with pytest.raises(ConfigError, match=r"glue.seeds: 2 has no effect with task: pretraining"):
        parse_config("", ["dataset.path=x", "tokenizer.path=x", "trainer.max_steps=1", "glue.seeds=2"])


def test_a_file_of_other_code_is_migrated() -> None:
    old = (
        "task: glue\n"
        "model: {hidden_size: 768, dropout_prob: 0.1, name: x}\n"
        "tokenizer: {name: bert-base-uncased}\n"
        "dataset: {name: glue}\n"
        "optimizer: {lr: 2e-5, weight_decay: 0.01}\n"
        "trainer: {num_train_epochs: 3, per_device_train_batch_size: 16, eval_strategy: epoch, eval_steps: 50,"
        " metric_for_best_model: x, output_dir: out}\n"
        "glue: {task_name: rte, num_labels: 2, max_seq_length: 128, pretrained_checkpoint_dir: outputs/x,"
        " pretrained_checkpoint: latest, classifier_dropout: 0.2, num_workers: 4, preprocessing_num_proc: 4}\n"
    )
    text, edits = migrate(old)
    config = parse_config(text)
    glue = config.glue
    assert (glue.model, glue.tasks, glue.seeds) == ("outputs/x", ("rte",), 1)
    assert (glue.learning_rates, glue.batch_sizes) == ((2e-5,), (16,))
    assert (config.finetune.classifier_dropout, config.dataset.max_seq_length) == (0.2, 128)
    assert (config.model.dropout_prob, config.model.hidden_size, config.tokenizer.name) == (0.1, 768, None)
    assert config.trainer.num_train_epochs == 3
    assert "renamed glue.task_name to glue.tasks" in edits
    assert "removed glue.num_labels: follows from the task: remove it" in edits


def test_models_of_a_call() -> None:
    (one,) = parse_glue(["cola", "outputs/a"], program="x")
    assert (one.glue.model, one.glue.tasks, one.trainer.output_dir) == ("outputs/a", ("cola",), "outputs/glue/cola")
    both = parse_glue(["outputs/a", "--glue.seeds", "1", "bag:outputs/a"], program="x")
    assert [config.trainer.output_dir for config in both] == [
        "outputs/glue/all/outputs_a",
        "outputs/glue/all/bag_outputs_a",
    ]
    assert [config.glue.seeds for config in both] == [1, 1]
    with pytest.raises(CallError, match="called alike"):
        parse_glue(["outputs/a", "outputs/a"], program="x")
    with pytest.raises(CallError, match="task: pretraining is not for x; write task: glue"):
        parse_glue(["quickstart"], program="x")


def test_config_files_of_the_tasks_differ_in_the_tasks_alone() -> None:
    root = Path(__file__).parents[2] / "configs" / "glue"
    configs = {path.stem: load_config(path) for path in root.glob("*.yaml")}
    assert configs.keys() == {*TASKS, "all"} - {"ax"}
    assert configs["all"].glue.tasks == tuple(TASKS)
    assert all(name in configs[name].glue.tasks for name in configs if name != "all")
    texts = {
        "\n".join(line for line in config_to_yaml(x).splitlines() if "tasks:" not in line and "output_dir:" not in line)
        for x in configs.values()
    }
    assert len(texts) == 1
