"""Rules about contrastive fine-tuning: every error names the key and what to write."""

import pytest

from neobert.config.load import ConfigError, config_to_yaml, parse_config

BASE = (
    "task: contrastive\ndataset: {path: sets}\ntrainer: {max_steps: 3}\n"
    "contrastive: {pretrained_checkpoint_dir: outputs/run}\n"
)


def errors(*overrides: str, text: str = BASE) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, overrides)
    return caught.value.errors


def test_a_short_config_is_enough_and_comes_back_equal() -> None:
    sets = "contrastive.sets=[{name: a.csv, negative_columns: [x, y], anchor_prefix: 'query: '}, {name: QQP}]"
    config = parse_config(BASE, [sets, "contrastive.pooling=avg", "contrastive.matryoshka_dims=[64, 32]"])
    assert config.contrastive.pooling == "mean"
    assert [source.name for source in config.contrastive.sets] == ["a.csv", "QQP"]
    assert config.contrastive.sets[0].anchor_prefix == "query: "
    assert parse_config(config_to_yaml(config)) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("contrastive.pretrained_checkpoint_dir=null", "pretrained_checkpoint_dir: null leaves the encoder at random"),
        ("contrastive.allow_random_weights=true", "allow_random_weights: true is set beside"),
        ("contrastive.pretrained_checkpoint=last", "pretrained_checkpoint: last is neither a step nor latest"),
        ("dataset.path=null", "dataset.path: None must be the one folder"),
        ("contrastive.temperature=0", "contrastive.temperature: 0.0 must be at least 0.01"),
        ("contrastive.loss_type=distill", "contrastive.teacher: null, but contrastive.loss_type: distill learns from"),
        ("contrastive.teacher=x", "contrastive.teacher: x has no effect with contrastive.loss_type: auto"),
        ("contrastive.num_hard_negatives=-1", "contrastive.num_hard_negatives: -1 must be at least 0"),
        ("contrastive.pretraining_prob=1", "pretraining_prob: 1.0 must be at least 0 and less than 1"),
        (
            "contrastive.pretraining_prob=0.3",
            "pretraining_prob: 0.3 has no effect without contrastive.pretraining_dataset; set that",
        ),
        (
            "contrastive.pretraining_dataset=x",
            "pretraining_dataset: x has no effect without contrastive.pretraining_prob; set that",
        ),
        ("contrastive.loss_type=simcse", "loss_type: simcse compares two dropout masks"),
        ("contrastive.false_negative_margin=-1", "false_negative_margin: -1.0 must be at least 0 (null keeps"),
        ("contrastive.matryoshka_dims=[8, 8]", "matryoshka_dims: [8, 8] must be different widths"),
        ("dataset.alpha=-1", "dataset.alpha: -1.0 must be at least 0"),
        ("dataset.mixture=[{name: x}]", "dataset.mixture: "),
        ("dataset.train_split=train", "dataset.train_split: train has no effect with task: contrastive"),
        ("datacollator.pack_sequences=false", "datacollator.pack_sequences: false has no effect"),
        ("trainer.max_tokens=100", "trainer.max_tokens: 100 has no effect"),
        ("trainer.torch_compile=true", "trainer.torch_compile_dynamic: the length of a batch is that of its texts"),
        (
            "trainer.z_loss=0.1",
            "trainer.z_loss: 0.1 has no effect with task: contrastive and contrastive.pretraining_objective: simcse",
        ),
        ("contrastive.pretraining_objective=mlm", "pretraining_objective: mlm has no effect without"),
        (
            "contrastive.sets=[{name: x, label_column: a, positive_column: b}]",
            "contrastive.sets: [0].positive_column: b has no effect beside label_column",
        ),
        (
            "contrastive.sets=[{name: x, score_column: a, negative_columns: b}]",
            "contrastive.sets: [0].negative_columns: b has no effect beside score_column",
        ),
        ("contrastive.sets=[{split: train}]", "contrastive.sets: [0] names no set"),
        ("contrastive.sets=[{name: x, score_column: a, label_column: b}]", "contrastive.sets: [0].score_column: 'a'"),
        ("contrastive.eval_sets=[{name: x, max_pairs: 0}]", "contrastive.eval_sets: [0].max_pairs: 0 must be"),
    ],
)
def test_what_is_refused(override: str, message: str) -> None:
    assert any(message in error for error in errors(override))


def test_a_teacher_has_one_vector_a_text_and_its_own_tokenizer() -> None:
    taught = ["contrastive.loss_type=distill", "contrastive.teacher=x"]
    assert parse_config(BASE, taught).contrastive.teacher == "x"
    (error,) = errors(*taught, "contrastive.pooling=tokens")
    assert error.startswith("contrastive.pooling: tokens makes no vector")
    assert any(error.startswith("tokenizer.train: true") for error in errors(*taught, "tokenizer.train=true"))


def test_two_ways_to_name_sets_exclude_each_other() -> None:
    assert "dataset.name: x is set beside contrastive.sets, which replaces it; keep one of them" in errors(
        "dataset.name=x", "contrastive.sets=[{name: y}]"
    )
    both = errors("dataset.load_all_from_disk=true", "dataset.force_redownload=true")
    assert both == [
        "dataset.force_redownload: true is set beside dataset.load_all_from_disk: true, which fetches nothing"
    ]


def test_spikes_are_not_compared_between_two_kinds_of_steps() -> None:
    mixed = ["contrastive.pretraining_prob=0.1", "contrastive.pretraining_dataset=x", "model.dropout_prob=0.1"]
    (error,) = errors(*mixed, "trainer.skip_spikes=6")
    assert error.startswith("trainer.skip_spikes: 6.0 compares losses of successive steps")


def test_keys_of_one_task_are_refused_in_the_other() -> None:
    text = "dataset: {name: python_stdlib}\ntokenizer: {train: true}\ntrainer: {max_steps: 3}\n"
    found = errors("contrastive.temperature=0.1", "dataset.alpha=0.5", "contrastive.eval_sets=[{name: x}]", text=text)
    assert sorted(error.split(":")[0] for error in found) == [
        "contrastive.eval_sets",
        "contrastive.temperature",
        "dataset.alpha",
    ]
    assert all(
        "has no effect with task: pretraining; remove it, or write task: contrastive" in error for error in found
    )


def test_a_tokenizer_is_needed_only_without_a_checkpoint() -> None:
    random = ["contrastive.pretrained_checkpoint_dir=null", "contrastive.allow_random_weights=true"]
    (error,) = errors(*random)
    assert error.startswith("tokenizer.name: no tokenizer")
    parse_config(BASE, [*random, "tokenizer.path=x"])
