"""Files of other NeoBERT code: every edit is listed, and the result loads."""

import subprocess
import sys
from pathlib import Path

import pytest

from neobert.config.load import ConfigError, parse_config
from neobert.config.migrate import MigrationError, migrate
from neobert.config.schema import Config
from neobert.config.schema_optimizer import MuonSection

ROOT = Path(__file__).parents[2]

OLD = """
variables: {length: 1024, run: "x"}
model:
  hidden_size: 768
  max_position_embeddings: 512
  vocab_size: 30522
  flash_attention: true
  ngpt: false
  pad_token_id: 0
dataset:
  name: refinedweb
  path: ""
  streaming: true
  max_seq_length: $variables.length
  prefetch_factor: null
  persistent_workers: true
  revision: 012e4
  train_split: train[:90%]
tokenizer: {name: bert-base-uncased, max_length: 512, padding: max_length, truncation: true}
optimizer:
  name: muonclip
  lr: 1e-4
  muon_config: {muon_beta: 0.9, enable_clipping: false, clipping_threshold: 30, algorithm: polar_express}
scheduler: {name: cosine, warmup_percent: 2, decay_percent: 90}
trainer:
  max_steps: 100000
  num_train_epochs: 3
  train_batch_size: 32
  report_to: [wandb]
  max_grad_norm: 1.0
  bf16: true
  output_dir: "output/{$variables.run}"
  overwrite_output_dir: true
datacollator: {mlm_probability: 0.2, pack_sequences: true, pad_to_multiple_of: 8}
wandb: {project: p, log_interval: 50}
debug: false
"""


def test_a_file_with_many_old_keys():
    text, edits = migrate(OLD)
    config = parse_config(text)
    assert config.model.max_position_embeddings == config.dataset.max_seq_length == 1024
    assert config.model.attn_backend == "flash_attn_varlen"
    assert config.model.vocab_size is None
    assert (config.dataset.name, config.dataset.path) == ("tiiuae/falcon-refinedweb", None)
    assert (config.dataset.revision, config.dataset.train_split) == ("012e4", "train[:90%]")
    assert config.tokenizer.max_length is None
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay) == ("muonclip", 1e-4, 0.01)
    assert config.optimizer.muon_config == MuonSection(muon_beta=0.9, enable_clipping=False)
    trainer = config.trainer
    assert (trainer.max_steps, trainer.num_train_epochs) == (100_000, None)
    assert (trainer.per_device_train_batch_size, trainer.gradient_clipping, trainer.logging_steps) == (32, 1.0, 50)
    assert (trainer.mixed_precision, trainer.output_dir, trainer.overwrite_output_dir) == ("bf16", "output/x", False)
    assert config.trainer.report_to == ("wandb",)
    assert "max_seq_length: $variables.length" in text
    listed = "\n".join(edits)
    for sentence in [
        "renamed trainer.train_batch_size to trainer.per_device_train_batch_size",
        "renamed trainer.bf16 to trainer.mixed_precision",
        "replaced model.flash_attention by model.attn_backend: flash_attn_varlen",
        "removed model.vocab_size: it was overwritten by the tokenizer's size",
        "removed tokenizer.padding: has no effect",
        "removed trainer.num_train_epochs: trainer.max_steps is the budget",
        "removed optimizer.muon_config.algorithm: is an old name",
        "removed optimizer.muon_config.clipping_threshold: it has no effect without optimizer.muon_config.enable_",
        "wrote optimizer.weight_decay: 0.01, the default there (here 0.1)",
    ]:
        assert sentence in listed


def test_masking_of_a_contrastive_file_without_masked_steps_is_removed():
    text, edits = migrate(
        "task: contrastive\ndataset: {path: x}\ndatacollator: {mlm_probability: 0.15, mask_all: true}\n"
        "contrastive: {pretrained_checkpoint_dir: y}"
    )
    assert parse_config(text).datacollator == Config().datacollator
    for key in ("datacollator.mlm_probability", "datacollator.mask_all"):
        assert (
            f"removed {key}: it has no effect with task: contrastive and contrastive.pretraining_objective: simcse"
            in edits
        )


def test_an_empty_file_gets_what_it_meant():
    text, _ = migrate("{}")
    config = parse_config(text)
    assert config.trainer.max_steps == 1_000_000
    assert config.tokenizer.name == "bert-base-uncased"
    assert (config.datacollator.mlm_probability, config.datacollator.pack_sequences) == (0.15, False)
    assert config.optimizer.betas == (0.9, 0.999)
    assert config.trainer.gradient_clipping is None


def test_a_file_of_this_code_changes_only_where_defaults_differ():
    once, _ = migrate(OLD)
    twice, edits = migrate(once)
    assert (twice, edits) == (once, [])


@pytest.mark.parametrize(
    ("trainer", "engine", "reshards"),
    [
        ("fsdp: full_shard auto_wrap, fsdp_reshard_after_forward: false", "fsdp2", False),
        ("fsdp: true, fsdp_config: {fsdp_version: 1, fsdp_sharding_strategy: HYBRID_SHARD}", "hsdp", True),
        ("fsdp: '', fsdp_config: {min_num_params: 0}, fsdp_min_num_params: 0", "auto", True),
        ("fsdp: false, fsdp_transformer_layer_cls_to_wrap: null", "auto", True),
    ],
)
def test_fsdp_is_an_engine(trainer: str, engine: str, reshards: bool):
    text, edits = migrate(f"trainer: {{{trainer}}}")
    section = parse_config(text).trainer
    assert (section.parallel, section.reshard_after_forward) == (engine, reshards)
    assert all("fsdp" in edit for edit in edits[:2])


def test_settings_of_muon_beside_another_optimizer_are_removed():
    text, edits = migrate("optimizer: {name: adamw, muon_config: {ns_steps: 4, norm_factor: none}}")
    assert parse_config(text).optimizer.muon_config == MuonSection()
    assert "removed optimizer.muon_config.ns_steps: it has no effect with optimizer.name: adamw" in edits
    text, edits = migrate("optimizer: {name: muon, muon_config: {norm_factor: none}}")
    assert (parse_config(text).optimizer.name, parse_config(text).optimizer.muon_config.norm_factor) == (
        "muonclip",
        "none",
    )
    assert "changed optimizer.name from muon to muonclip" in edits


@pytest.mark.parametrize(
    ("optimizer", "measured"),
    [
        ("{name: muonclip}", True),
        ("{name: muonclip, muon_config: {capture_last_microbatch_only: false}}", False),
        ("{name: muonclip, muon_config: {enable_clipping: false}}", None),
        ("{name: adamw}", None),
    ],
)
def test_attention_logits_are_measured_where_they_were(optimizer, measured):
    """There the last micro-batch alone was the default; None: the key has no effect and is not written."""
    text, edits = migrate(f"optimizer: {optimizer}\n")
    key = "optimizer.muon_config.capture_last_microbatch_only"
    assert ("capture_last_microbatch_only" in text) is (measured is not None)
    assert parse_config(text).optimizer.muon_config.capture_last_microbatch_only is (measured or False)
    assert (f"wrote {key}: true, the default there (here false)" in edits) is (measured is True)
    assert migrate(text) == (text, [])


def test_epochs_alone_stay_the_budget():
    text, _ = migrate("trainer: {num_train_epochs: 3}\ndataset: {path: data}\n")
    assert parse_config(text).trainer.num_train_epochs == 3.0


def test_null_and_double_names():
    text, edits = migrate("trainer: {max_ckpt: null, dir: a, output_dir: b, save_total_limit: 4, max_steps: 5}")
    assert parse_config(text).trainer.output_dir == "b"
    assert "removed trainer.max_ckpt: save_total_limit" not in edits
    assert "removed trainer.dir: trainer.output_dir is in the file" in edits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: mteb\n", "task: mteb: only files of pretraining, contrastive, glue are migrated"),
        ("a: [", "not valid YAML"),
        ("trainer: {max_stepz: 5}\n", "trainer.max_stepz: unknown key. Did you mean trainer.max_steps?"),
        ("trainer: {mixed_precision: fp16}\n", "fp16 is refused"),
    ],
)
def test_what_cannot_be_migrated(text, message):
    with pytest.raises(MigrationError) as caught:
        migrate(text)
    assert message in str(caught.value)


OTHER_KEYS = [
    "model.classifier_init_range",
    "model.base_scale",
    "model.pad_token_id",
    "model.from_hub",
    "dataset.trust_remote_code",
    "tokenizer.padding",
    "optimizer.muon_config.polar_express",
    "trainer.early_stopping",
    "trainer.metric_for_best_model",
    "trainer.greater_is_better",
    "trainer.load_best_model_at_end",
    "trainer.dataloader_num_workers",
    "trainer.max_ckpt",
    "trainer.train_batch_size",
    "trainer.eval_batch_size",
    "wandb.log_interval",
    "dataset.pretraining_prob",
    "glue.task_name",
    "glue.num_labels",
    "accelerate_config_file",
    "mteb_task_type",
    "mteb_batch_size",
    "mteb_pooling",
    "mteb_overwrite_results",
    "pretrained_checkpoint",
    "use_deepspeed",
    "pretraining_metadata",
    "debug",
    "config_path",
    "optimizer.muon_config.clipping_layers_mapping",
    "optimizer.muon_config.detect_anomalies",
    "optimizer.muon_config.algorithm",
]
"""Keys that files of other NeoBERT code hold and that are no keys here."""


def nest(key: str) -> str:
    *sections, name = key.split(".")
    return "{" + "".join(f"{section}: {{" for section in sections) + f"{name}: 1" + "}" * len(sections) + "}"


@pytest.mark.parametrize("key", OTHER_KEYS)
def test_every_other_key_is_refused_with_a_sentence_and_migrated(key):
    with pytest.raises(ConfigError) as caught:
        parse_config(nest(key))
    known = [error for error in caught.value.errors if key.startswith(error.partition(":")[0])]
    assert len(known) == 1
    assert "unknown key" not in known[0]
    text, edits = migrate(nest(key))
    assert parse_config(text)
    assert any(key in edit for edit in edits)


def test_the_normalised_model():
    """There its feed-forward layer had no 2/3 rule, and `base_scale` stood in every file."""
    old = "model: {ngpt: true, base_scale: 0.05, intermediate_size: 256}\noptimizer: {weight_decay: 0}\n"
    text, edits = migrate(old)
    config = parse_config(text)
    assert (config.model.ngpt, config.model.base_scale, config.model.intermediate_size) == (True, 0.05, 384)
    assert "changed model.intermediate_size from 256 to 384: 2/3 of it are used here, all of it there" in edits
    text, edits = migrate("model: {ngpt: false, base_scale: 0.05, intermediate_size: 256}\n")
    assert parse_config(text).model.intermediate_size == 256
    assert "removed model.base_scale: has no effect without model.ngpt" in edits


def test_the_script(tmp_path):
    old = tmp_path / "old.yaml"
    old.write_text(OLD)
    command = [sys.executable, "scripts/migrate_config.py"]
    done = subprocess.run([*command, str(old)], cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert parse_config(done.stdout).trainer.max_steps == 100_000
    assert " edits:\n  - " in done.stderr
    assert "renamed trainer.bf16 to trainer.mixed_precision" in done.stderr
    old.write_text("task: mteb\n")
    done = subprocess.run([*command, str(old)], cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (2, "")
    assert "task: mteb: only files of" in done.stderr


def test_a_contrastive_file_is_migrated():
    text, edits = migrate(
        "task: contrastive\n"
        "model: {hidden_size: 768, dropout_prob: 0.1}\n"
        "dataset: {name: ALL, path: data/pairs, alpha: 0.5, streaming: true, pretraining_prob: 0.3}\n"
        "tokenizer: {name: bert-base-uncased, padding: max_length}\n"
        "trainer: {num_train_epochs: 1}\n"
        "contrastive: {temperature: 0.05, pooling: avg, loss_type: simcse, pretrained_checkpoint_dir: outputs/x}\n"
    )
    config = parse_config(text)
    assert (config.contrastive.loss_type, config.contrastive.pooling) == ("infonce", "mean")
    assert (config.dataset.alpha, config.dataset.streaming, config.tokenizer.name) == (0.5, None, None)
    assert "renamed dataset.pretraining_prob to contrastive.pretraining_prob" in edits
    assert "removed contrastive.pretraining_prob: it has no effect without contrastive.pretraining_dataset" in edits
    assert "wrote contrastive.loss_type: infonce, which is simcse there" in edits


def test_keys_of_contrastive_fine_tuning_leave_a_pretraining_file():
    old = "dataset: {name: x, alpha: 2}\ntrainer: {max_steps: 3}\ncontrastive: {temperature: 1, pooling: cls}\n"
    text, edits = migrate(old)
    assert parse_config(text).contrastive == Config().contrastive
    for key in ("dataset.alpha", "contrastive.temperature", "contrastive.pooling"):
        assert f"removed {key}: it has no effect with task: pretraining" in edits
