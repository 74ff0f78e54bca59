"""Rules between fields: each breaks once and its sentence names the key, the value and the remedy."""

import pytest

from neobert.config.fields import FIELDS
from neobert.config.load import build_config
from neobert.config.rules import validate, warnings
from neobert.config.schema import Config
from neobert.config.schema_data import MixtureSource

VALID = {"dataset.name": "python_stdlib", "tokenizer.train": True, "trainer.max_steps": 10_000}


def config_with(**changes: object) -> Config:
    return build_config({**VALID, **{key.replace("__", "."): value for key, value in changes.items()}})


def only(found: list[str]) -> str:
    assert len(found) == 1, found
    return found[0]


def test_the_base_has_no_errors_and_no_warnings():
    assert validate(config_with()) == []
    assert warnings(config_with()) == []


def test_the_defaults_lack_a_source_a_tokenizer_and_a_budget():
    errors = validate(Config())
    assert [e.partition(":")[0] for e in errors] == ["dataset.name", "tokenizer.name", "trainer.max_steps"]


NGPT = {"model__ngpt": True, "optimizer__weight_decay": 0.0}

MIXTURE = (MixtureSource(path="a"), MixtureSource(path="b"))
WEIGHTED = (MixtureSource(path="a", weight=1.0), MixtureSource(path="b", weight=2.0))
EPOCHS = {"trainer__max_steps": None, "trainer__num_train_epochs": 2.0, "dataset__name": None}
DISTILLED = {"trainer__objective": "distill", "distill__teacher": "run", "tokenizer__train": False}

ERRORS = [
    (
        {**EPOCHS, "dataset__mixture": WEIGHTED},
        "trainer.num_train_epochs: 2.0 has no meaning with a weight in dataset.",
    ),
    (
        {**EPOCHS, "dataset__mixture": MIXTURE, "dataset__mixture_alpha": 0.5},
        "trainer.num_train_epochs: 2.0 has no meaning with dataset.mixture_alpha",
    ),
    (
        {"dataset__name": None, "dataset__mixture": MIXTURE, "dataset__mixture_alpha": 0.5, "dataset__streaming": True},
        "dataset.streaming: true beside dataset.mixture_alpha = 0.5",
    ),
    (
        {"trainer__objective": "mlm_jepa", "trainer__ema_decay": 0.9, "trainer__z_loss": 1e-4},
        "trainer.z_loss: 0.0001 is no part of the loss of trainer.objective: mlm_jepa; write 0",
    ),
    (
        {**DISTILLED, "tokenizer__path": "t", "datacollator__mlm_probability_final": 0.1},
        "datacollator.mlm_probability_final: 0.1 changes the number of targets",
    ),
    (
        {"model__ngpt": True},
        "optimizer.weight_decay: 0.1 does nothing with model.ngpt: true, whose matrices are",
    ),
    ({**NGPT, "model__rope": False}, "model.rope: False is not part of the normalised model (model.ngpt: true)"),
    ({**NGPT, "model__rms_norm": False}, "model.rms_norm: False is not part of the normalised model"),
    ({**NGPT, "model__hidden_act": "gelu"}, "model.hidden_act: gelu is not part of the normalised model"),
    ({**NGPT, "model__dropout_prob": 0.1}, "model.dropout_prob: 0.1 is not part of the normalised model"),
    ({**NGPT, "model__norm_eps": 1e-6}, "model.norm_eps: 1e-06 is not part of the normalised model"),
    ({**NGPT, "model__init": "megatron"}, "model.init: megatron is not part of the normalised model"),
    ({**NGPT, "model__init_std": 0.1}, "model.init_std: 0.1 is not part of the normalised model"),
    (
        {**NGPT, "model__init_zero_residual": True},
        "model.init_zero_residual: True is not part of the",
    ),
    ({**NGPT, "model__qk_norm": True}, "model.qk_norm: True is not part of the normalised model"),
    ({**NGPT, "model__embedding_norm": True}, "model.embedding_norm: True is not part of the normalised model"),
    ({**NGPT, "model__decoder_bias": True}, "remove it, its default is False"),
    ({**NGPT, "model__prediction_head": True}, "model.prediction_head: True is not part of the normalised model"),
    ({"model__first_attention_norm": False}, "model.first_attention_norm: false leaves the first block without any"),
    ({"model__local_rope_theta": 5.0}, "model.local_rope_theta: 5.0 has no effect without model.local_attention"),
    (
        {"model__local_attention": 8, "model__local_rope_theta": 10000.0},
        "model.local_rope_theta: 10000.0 is model.rope_theta itself; remove it",
    ),
    (
        {"model__local_attention": 8, "model__local_rope_theta": 5.0, "model__rope": False},
        "model.local_rope_theta: 5.0 has no effect with model.rope: false",
    ),
    ({**NGPT, "model__decoder_init_range": 0.1}, "model.decoder_init_range: 0.1 is not part of the normalised model"),
    ({**NGPT, "model__base_scale": 0.0}, "model.base_scale: 0.0 must be greater than 0"),
    ({"model__base_scale": 0.1}, "model.base_scale: 0.1 has no effect without model.ngpt: true; remove one of the two"),
    (
        {"model__init": "megatron", "model__embedding_init_range": 0.1},
        "model.embedding_init_range: 0.1 has no effect with model.init: megatron; remove one of the two",
    ),
    (
        {"model__init_std": 0.1},
        "model.init_std: 0.1 has no effect with model.init: uniform; remove it, or write model.init: trunc",
    ),
    ({"model__init": "small", "model__init_std": 0.1}, "model.init_std: 0.1 has no effect with model.init: small"),
    (
        {"model__init_from": "x", "model__decoder_bias": True, "model__init_drop_decoder_bias": True},
        "model.init_drop_decoder_bias: true leaves out what model.decoder_bias: true needs; write false for one",
    ),
    (
        {"model__hidden_size": 770},
        "model.num_attention_heads: 12 does not divide model.hidden_size 770; choose a",
    ),
    ({"model__hidden_size": 60}, "model.rope: rotary positions need an even head size, and model.hidden_size 60 / "),
    ({"model__hidden_size": 0}, "model.hidden_size: 0 must be at least 1"),
    ({"model__max_position_embeddings": 256}, "256 is less than dataset.max_seq_length = 512; raise it, or lower"),
    ({"model__dropout_prob": 1.0}, "model.dropout_prob: 1.0 must be at least 0 and less than 1"),
    ({"model__norm_eps": 0.0}, "model.norm_eps: 0.0 must be greater than 0"),
    ({"dataset__name": None}, "dataset.name: nothing to train on; name a dataset of the hub, python_stdlib, or"),
    ({"dataset__config": "en"}, "dataset.config: 'en' has no meaning for python_stdlib; remove it"),
    ({"dataset__train_split": "a+b"}, "dataset.train_split: 'a+b' is a sum of splits, which is not read"),
    ({"dataset__eval_split": "a+b"}, "list the sources in dataset.mixture"),
    ({"dataset__mixture": (MixtureSource(weight=1.0),)}, "dataset.mixture: [0] names no source; give it a name (hub)"),
    ({"dataset__mixture": (MixtureSource(path="a", name="b"),)}, "[0].name: 'b' is set beside path: 'a'; keep one"),
    ({"dataset__mixture": (MixtureSource(path="a", weight=0.0),)}, "[0].weight: 0.0 must be greater than 0"),
    ({"dataset__mixture": (MixtureSource(path="a", max_documents=0),)}, "[0].max_documents: 0 must be at least 1"),
    (
        {"dataset__mixture": (MixtureSource(path="a", weight=1.0), MixtureSource(path="b"))},
        "dataset.mixture: [1].weight: is not set, but another source has a weight; give every one a weight, or none",
    ),
    (
        {"dataset__shuffle_buffer_size": 100, "dataset__num_lanes": 4},
        "dataset.shuffle_buffer_size: 100 is set beside dataset.num_lanes = 4, which it derives; write null for one",
    ),
    (
        {"dataset__pre_tokenize": True, "dataset__streaming": True},
        "dataset.pre_tokenize: true tokenises to disk, but dataset.streaming is true; write null for one of them",
    ),
    (
        {"dataset__validation_split": 0.1, "dataset__eval_samples": 10},
        "dataset.validation_split: 0.1 is set beside dataset.eval_samples = 10; both hold documents out",
    ),
    ({"dataset__validation_split": 1.0}, "dataset.validation_split: 1.0 must be greater than 0 and less than 1"),
    ({"dataset__min_length": 512}, "dataset.min_length: 512 would drop every document"),
    ({"dataset__max_seq_length": 2, "dataset__min_length": 1}, "dataset.max_seq_length: 2 must be at least 3"),
    ({"dataset__eval_samples": 0}, "dataset.eval_samples: 0 must be at least 1"),
    ({"dataset__num_workers": -1}, "dataset.num_workers: -1 must be at least 0"),
    ({"dataset__prefetch_factor": 0}, "dataset.prefetch_factor: 0 must be at least 1"),
    (
        {"tokenizer__name": "a"},
        "tokenizer.name: 'a' names a tokenizer, but tokenizer.train is true; write null for one",
    ),
    ({"tokenizer__path": "a"}, "tokenizer.path: 'a' names a tokenizer, but tokenizer.train is true"),
    (
        {"tokenizer__train": False},
        "tokenizer.name: no tokenizer; name one of the hub, a folder with tokenizer.path, or",
    ),
    (
        {"tokenizer__train": False, "tokenizer__name": "a", "tokenizer__vocab_size": 1000},
        "tokenizer.vocab_size: 1000 has no effect without tokenizer.train; set that, or remove this key",
    ),
    (
        {"tokenizer__train": False, "tokenizer__path": "a", "tokenizer__train_documents": 5},
        "tokenizer.train_documents: 5 has no effect without tokenizer.train; set that, or remove this key",
    ),
    (
        {"tokenizer__revision": "main"},
        "tokenizer.revision: main has no effect without tokenizer.name; set that, or remove this key",
    ),
    ({"tokenizer__vocab_size": 200}, "tokenizer.vocab_size: 200 is less than the 256 bytes and 5 special tokens"),
    ({"tokenizer__vocab_size": 2}, "tokenizer.vocab_size: 2 must be at least 16"),
    (
        {"tokenizer__vocab_size": 8192, "model__vocab_size": 4096},
        "model.vocab_size: 4096 is less than tokenizer.vocab_size = 8192; write null to follow the tokenizer",
    ),
    ({"datacollator__mlm_probability": 0.0}, "mlm_probability: 0.0 must be greater than 0 and at most 1"),
    ({"datacollator__eval_mlm_probability": 1.5}, "eval_mlm_probability: 1.5 must be greater than 0 and at most 1"),
    (
        {"datacollator__pad_to_multiple_of": 100, "datacollator__pack_sequences": False},
        "datacollator.pad_to_multiple_of: 100 does not divide dataset.max_seq_length = 512",
    ),
    ({"optimizer__lr": 0.0}, "optimizer.lr: 0.0 must be greater than 0"),
    ({"optimizer__betas": (0.9, 1.0)}, "optimizer.betas: [0.9, 1.0] must be at least 0 and less than 1"),
    ({"optimizer__weight_decay": -0.1}, "optimizer.weight_decay: -0.1 must be at least 0"),
    ({"scheduler__warmup_percent": 101.0}, "scheduler.warmup_percent: 101.0 must be from 0 to 100"),
    ({"scheduler__decay_percent": -1.0}, "scheduler.decay_percent: -1.0 must be from 0 to 100"),
    ({"scheduler__final_lr_ratio": 2.0}, "scheduler.final_lr_ratio: 2.0 must be from 0 to 1"),
    (
        {"scheduler__decay_steps": 500},
        "scheduler.decay_steps: 500 is where the decay ends, counted from the start of the run, so it must be greater"
        " than scheduler.warmup_steps = 2000",
    ),
    ({"scheduler__warmup_percent": 20.0, "scheduler__decay_percent": 10.0}, "scheduler.decay_percent: 10.0 is where"),
    ({"trainer__max_steps": None}, "this config sets none"),
    ({"trainer__max_tokens": 5}, "this config sets trainer.max_steps = 10000 and trainer.max_tokens = 5"),
    ({"trainer__max_steps": 0}, "trainer.max_steps: 0 must be at least 1"),
    ({"trainer__per_device_train_batch_size": 0}, "trainer.per_device_train_batch_size: 0 must be at least 1"),
    ({"trainer__gradient_accumulation_steps": 0}, "trainer.gradient_accumulation_steps: 0 must be at least 1"),
    (
        {"trainer__global_batch_size": 100},
        "100 is not a multiple of trainer.per_device_train_batch_size = 16; write 96 or",
    ),
    ({"trainer__global_batch_size": 8}, "write 16"),
    (
        {"trainer__global_batch_size": 64, "trainer__gradient_accumulation_steps": 4},
        "trainer.gradient_accumulation_steps: 4 is set beside trainer.global_batch_size = 64, which derives it",
    ),
    (
        {"trainer__per_device_train_batch_size": "auto"},
        "trainer.per_device_train_batch_size: auto needs trainer.global_batch_size, or the memory of the machine",
    ),
    (
        {
            "trainer__per_device_train_batch_size": "auto",
            "trainer__global_batch_size": 64,
            "trainer__enforce_full_packed_batches": False,
        },
        "trainer.per_device_train_batch_size: auto needs trainer.enforce_full_packed_batches: true",
    ),
    (
        {
            "trainer__per_device_train_batch_size": "auto",
            "trainer__global_batch_size": 64,
            "trainer__gradient_accumulation_steps": 2,
        },
        "trainer.gradient_accumulation_steps: 2 is set beside trainer.global_batch_size = 64, which derives it",
    ),
    (
        {"trainer__profiler_steps": 3},
        "trainer.profiler_steps: 3 has no effect without trainer.profiler_steps_start; set that, or remove",
    ),
    (
        {"trainer__profiler_steps_start": 3},
        "trainer.profiler_steps_start: 3 has no effect without trainer.profiler_steps; set that, or remove",
    ),
    (
        {"trainer__profiler_steps_start": 10_001, "trainer__profiler_steps": 1},
        "trainer.profiler_steps_start: 10001 is after the last step, trainer.max_steps = 10000; choose an earlier one",
    ),
    (
        {"trainer__profiler_steps_start": -1, "trainer__profiler_steps": 1},
        "trainer.profiler_steps_start: -1 must be at least 1",
    ),
    (
        {"trainer__profiler_steps": -1, "trainer__profiler_steps_start": 3},
        "trainer.profiler_steps: -1 must be at least 0",
    ),
    ({"trainer__save_steps": -1}, "trainer.save_steps: -1 must be at least 0"),
    ({"trainer__eval_steps": -1}, "trainer.eval_steps: -1 must be at least 0"),
    ({"trainer__logging_steps": -1}, "trainer.logging_steps: -1 must be at least 0"),
    ({"trainer__max_bad_steps": 0}, "trainer.max_bad_steps: 0 must be at least 1"),
    ({"trainer__skip_spikes": 0.0}, "trainer.skip_spikes: 0.0 must be greater than 0"),
    ({"trainer__rollback_steps": 0}, "trainer.rollback_steps: 0 must be at least 1"),
    ({"trainer__max_hours": 0.0}, "trainer.max_hours: 0.0 must be greater than 0"),
    (
        {"trainer__rollback_steps": 100, "trainer__save_steps": 0},
        "trainer.rollback_steps: 100 has no effect without trainer.save_steps; set that, or remove this key",
    ),
    (
        {"trainer__rollback_steps": 100, "trainer__save_model": False, "trainer__save_steps": 0},
        "trainer.rollback_steps: 100 has no effect without trainer.save_model; set that, or remove this key",
    ),
    ({"trainer__gradient_clipping": 0.0}, "trainer.gradient_clipping: 0.0 must be greater than 0 (null never clips)"),
    ({"trainer__output_dir": ""}, "trainer.output_dir: may not be empty"),
    ({"wandb__name": ""}, "wandb.name: may not be empty; write null"),
    ({"trainer__fill_mask_texts": ("a",)}, "trainer.fill_mask_texts: 'a' has no [MASK] to fill in"),
    ({"seed": -1}, "seed: -1 must be at least 0"),
    ({"seed": 2**63}, f"seed: {2**63} must be at least 0 and less than {2**63}"),
    (
        {"model__attn_backend": "flash_attn_varlen", "trainer__use_cpu": True},
        "model.attn_backend: flash_attn_varlen needs a GPU, but trainer.use_cpu is true; write model.attn_backend",
    ),
    (
        {"model__attn_backend": "flash_attn_varlen", "trainer__mixed_precision": "no"},
        "model.attn_backend: flash_attn_varlen needs trainer.mixed_precision: bf16, it is no; write model.attn_backend",
    ),
    (
        {"model__attn_backend": "flex", "trainer__use_cpu": True},
        "model.attn_backend: flex needs a GPU, but trainer.use_cpu is true; write model.attn_backend: auto",
    ),
    (
        {"model__kernel_backend": "liger", "trainer__use_cpu": True},
        "model.kernel_backend: liger needs a GPU, but trainer.use_cpu is true; write model.kernel_backend: auto",
    ),
    ({"model__local_attention": 0}, "model.local_attention: 0 must be at least 1"),
    (
        {"model__local_attention": 64, "model__global_attention_every": 1},
        "model.global_attention_every: 1 must be at least 2 (1 leaves no layer a window)",
    ),
    (
        {"model__global_attention_every": 4},
        "model.global_attention_every: 4 has no effect without model.local_attention; set that, or remove",
    ),
    (
        {"trainer__gradient_checkpointing_every": 2},
        "trainer.gradient_checkpointing_every: 2 has no effect without trainer.gradient_checkpointing; set",
    ),
    (
        {"trainer__gradient_checkpointing": True, "trainer__gradient_checkpointing_every": 0},
        "trainer.gradient_checkpointing_every: 0 must be at least 1",
    ),
    ({"trainer__z_loss": -1e-4}, "trainer.z_loss: -0.0001 must be at least 0"),
    (
        {"dataset__pin_memory": True, "trainer__use_cpu": True},
        "dataset.pin_memory: true needs a GPU, but trainer.use_cpu",
    ),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors(changes, message):
    error = only(validate(config_with(**changes)))
    assert message in error
    assert error.partition(":")[0] in FIELDS


@pytest.mark.parametrize(
    "changes",
    [
        {"model__hidden_size": 60, "model__rope": False},
        {"dataset__name": None, "dataset__path": "folder"},
        {"dataset__path": "folder", "dataset__config": "en"},
        {"tokenizer__train": False, "tokenizer__name": "a", "tokenizer__revision": "main"},
        {"scheduler__decay_steps": 500, "scheduler__warmup_percent": 1.0},
        {"trainer__global_batch_size": 64},
        {"trainer__save_total_limit": 0},
        {"trainer__save_steps": 0, "trainer__eval_steps": 0, "trainer__logging_steps": 0},
        {"tokenizer__vocab_size": 100, "tokenizer__algorithm": "wordpiece"},
        {"datacollator__mlm_probability": 1.0},
        {"model__local_attention": 128, "model__global_attention_every": 4},
        {"trainer__gradient_checkpointing": True, "trainer__gradient_checkpointing_every": 2},
    ],
)
def test_what_is_allowed(changes):
    assert validate(config_with(**changes)) == []


def test_warm_up_longer_than_the_run_is_a_warning_with_both_numbers():
    config = config_with(trainer__max_steps=100)
    assert validate(config) == []
    assert "scheduler.warmup_steps: the warm-up takes 2000 steps but the run has 100" in only(warnings(config))
    assert warnings(config, total_steps=5000) == []
    config = config_with(trainer__max_steps=100, scheduler__total_steps=1000, scheduler__warmup_percent=50.0)
    assert "scheduler.warmup_percent: the warm-up takes 500 steps but the run has 100" in only(warnings(config))


def test_a_run_of_unknown_length_has_no_schedule_warnings():
    config = config_with(trainer__max_steps=None, trainer__max_tokens=1000)
    assert warnings(config) == []
    assert "the run has 30" in only(warnings(config, total_steps=30))


def test_a_warm_up_of_the_normalised_model_is_a_warning() -> None:
    assert only(warnings(config_with(**NGPT))) == (
        "scheduler.warmup_steps: 2000, but the normalised model (model.ngpt: true) needs no warm-up; write 0"
    )
    assert "scheduler.warmup_percent: 1.0, but" in only(warnings(config_with(**NGPT, scheduler__warmup_percent=1.0)))
    assert warnings(config_with(**NGPT, scheduler__warmup_percent=0.0)) == []
    assert warnings(config_with(**NGPT, scheduler__warmup_steps=0)) == []


def test_anomaly_detection_is_a_warning():
    config = config_with(trainer__detect_anomaly=True)
    assert "trainer.detect_anomaly: true checks every operation of the backward pass" in only(warnings(config))


def test_a_decay_beyond_the_run_is_a_warning():
    config = config_with(scheduler__decay_steps=20_000)
    assert "the decay ends at step 20000 but the run has 10000 steps" in only(warnings(config))


@pytest.mark.parametrize("key", ["tokenizer.max_length", "datacollator.max_length"])
def test_other_lengths_are_warnings(key):
    warning = only(warnings(config_with(**{key: 256})))
    assert warning == f"{key}: 256 has no effect, rows have dataset.max_seq_length = 512 slots; remove it"
    assert warnings(config_with(**{key: 512})) == []


def test_settings_without_effect_are_warnings():
    config = config_with(tokenizer__train=False, tokenizer__name="a", tokenizer__path="b")
    assert only(warnings(config)) == "tokenizer.name: 'a' is not used, the tokenizer is tokenizer.path = 'b'"
    config = config_with(datacollator__pad_to_multiple_of=8)
    assert "pad_to_multiple_of: 8 has no effect with datacollator.pack_sequences: true" in only(warnings(config))


def test_what_leaves_little_to_learn_is_a_warning():
    assert "datacollator.clm_steps: 10000 of 10000 steps" in only(warnings(config_with(datacollator__clm_steps=10_000)))
    short = warnings(config_with(datacollator__clm_steps=20), total_steps=20)
    assert "datacollator.clm_steps: 20 of 20 steps leaves none with masks" in "".join(short)
    assert warnings(config_with(datacollator__clm_steps=20)) == []
    frozen = {"trainer__trained_weights": "embeddings"}
    assert "without model.init_from" in only(warnings(config_with(**frozen)))
    assert warnings(config_with(**frozen, model__init_from="run")) == []
