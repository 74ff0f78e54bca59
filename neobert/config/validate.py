"""Every rule about values and about pairs of values. Pure: nothing is read, nothing is changed.

`validate` gives errors, `warnings` what is allowed but probably not meant. Each sentence begins with a dotted key and
names the value and the remedy.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from neobert.config.fields import FIELDS
from neobert.config.schema import Config
from neobert.config.validate_contrastive import check_contrastive
from neobert.config.validate_data import check_dataset, check_rows, check_tokenizer
from neobert.config.validate_measuring import check_automatic_batch, check_profiler, late_profiler
from neobert.config.validate_optimizer import check_optimizer
from neobert.config.validate_saving import check_average, check_resume_allow, check_rollback, check_saving
from neobert.config.validate_schedule import check_batch_warmup, check_masks, check_schedule, schedule_warnings
from neobert.model.config import variant_problems

BUDGETS = ("trainer.max_steps", "trainer.max_tokens", "trainer.num_train_epochs")
"""Exactly one of these is set."""

_Test = Callable[[Any], bool]

_RANGES: tuple[tuple[str, _Test, tuple[str, ...]], ...] = (
    (
        "must be at least 1",
        lambda x: x >= 1,
        (
            "model.hidden_size",
            "model.num_hidden_layers",
            "model.num_attention_heads",
            "model.intermediate_size",
            "model.max_position_embeddings",
            "model.vocab_size",
            "model.local_attention",
            "dataset.eval_samples",
            "dataset.num_lanes",
            "dataset.num_proc",
            "dataset.window_documents",
            "dataset.max_document_chars",
            "dataset.max_record_bytes",
            "dataset.prefetch_factor",
            "optimizer.muon_config.ns_steps",
            "optimizer.muon_config.clipping_interval",
            "optimizer.muon_config.clipping_qk_chunk_size",
            "tokenizer.train_documents",
            "datacollator.pad_to_multiple_of",
            "datacollator.mlm_probability_final_step",
            "datacollator.span_max_words",
            "scheduler.decay_steps",
            "scheduler.cooldown_steps",
            "scheduler.total_steps",
            "trainer.max_steps",
            "trainer.max_tokens",
            "trainer.per_device_train_batch_size",
            "trainer.per_device_eval_batch_size",
            "trainer.gradient_accumulation_steps",
            "trainer.global_batch_size",
            "trainer.batch_size_warmup_start",
            "trainer.batch_size_warmup_steps",
            "trainer.eval_max_batches",
            "trainer.save_milestone_every",
            "trainer.max_bad_steps",
            "trainer.rollback_steps",
            "trainer.gradient_checkpointing_every",
            "trainer.profiler_steps_start",
        ),
    ),
    (
        "must not be negative",
        lambda x: x >= 0,
        (
            "seed",
            "dataset.min_length",
            "dataset.max_bad_records",
            "dataset.network_retries",
            "dataset.num_workers",
            "dataset.shuffle_buffer_size",
            "optimizer.weight_decay",
            "optimizer.groups.matrices.weight_decay",
            "optimizer.groups.head.weight_decay",
            "optimizer.groups.embeddings.weight_decay",
            "optimizer.groups.vectors.weight_decay",
            "optimizer.muon_config.muon_decay",
            "optimizer.muon_config.clipping_warmup_steps",
            "scheduler.warmup_steps",
            "trainer.save_steps",
            "trainer.save_total_limit",
            "trainer.eval_steps",
            "trainer.eval_seed",
            "trainer.logging_steps",
            "trainer.profiler_steps",
            "trainer.z_loss",
            "trainer.ema_start_step",
        ),
    ),
    (
        "must be greater than 0",
        lambda x: x > 0,
        (
            "model.rope_theta",
            "model.norm_eps",
            "model.embedding_init_range",
            "model.decoder_init_range",
            "model.init_std",
            "model.base_scale",
            "optimizer.lr",
            "optimizer.groups.matrices.lr",
            "optimizer.groups.head.lr",
            "optimizer.groups.embeddings.lr",
            "optimizer.groups.vectors.lr",
            "optimizer.eps",
            "optimizer.muon_config.clipping_threshold",
            "trainer.num_train_epochs",
            "trainer.skip_spikes",
            "trainer.max_hours",
        ),
    ),
    ("must be greater than 0 (null never clips)", lambda x: x > 0, ("trainer.gradient_clipping",)),
    (
        "must be at least 0 and less than 1",
        lambda x: 0 <= x < 1,
        ("model.dropout_prob", "optimizer.muon_config.muon_beta", "optimizer.muon_config.normuon_beta2"),
    ),
    ("must be greater than 0 and less than 1", lambda x: 0 < x < 1, ("dataset.validation_split", "trainer.ema_decay")),
    (
        "must be greater than 0 and at most 1",
        lambda x: 0 < x <= 1,
        ("datacollator.mlm_probability", "datacollator.mlm_probability_final", "datacollator.eval_mlm_probability"),
    ),
    (
        "must be from 0 to 1",
        lambda x: 0 <= x <= 1,
        (
            "scheduler.final_lr_ratio",
            "datacollator.mask_fraction",
            "datacollator.random_fraction",
            "optimizer.muon_config.clipping_alpha",
        ),
    ),
    (
        "must be a percentage from 0 to 100",
        lambda x: 0 <= x <= 100,
        ("scheduler.warmup_percent", "scheduler.decay_percent"),
    ),
    (
        "must be a percentage greater than 0 and at most 100",
        lambda x: 0 < x <= 100,
        ("scheduler.cooldown_percent",),
    ),
    ("must both be at least 0 and less than 1", lambda x: all(0 <= b < 1 for b in x), ("optimizer.betas",)),
    ("must be steps of at least 1", lambda x: all(step >= 1 for step in x), ("trainer.save_milestone_steps",)),
    ("must be less than 2**63", lambda x: x < 2**63, ("seed", "trainer.eval_seed")),
    (
        "must be at least 3, for [CLS], one token and [SEP]",
        lambda x: x >= 3,
        ("dataset.max_seq_length",),
    ),
    ("must be at least 2 (1 leaves no layer a window)", lambda x: x >= 2, ("model.global_attention_every",)),
    ("must be at least 16", lambda x: x >= 16, ("tokenizer.vocab_size",)),
)


def validate(config: Config) -> list[str]:
    """Everything that makes `config` unusable, one sentence each; an empty list when there is nothing."""
    return [error for rule in _RULES for error in rule(config)]


def warnings(config: Config, *, total_steps: int | None = None) -> list[str]:
    """What is allowed but probably not meant.

    Args:
        config: A config without errors.
        total_steps: Optimizer steps of the run, when they are known better than from `trainer.max_steps`.
    """
    found = []
    length = config.dataset.max_seq_length
    for key in ("tokenizer.max_length", "datacollator.max_length"):
        value = FIELDS[key].value_in(config)
        if value is not None and value != length:
            found.append(f"{key}: {value} has no effect, rows have dataset.max_seq_length = {length} slots; remove it")
    if config.tokenizer.path is not None and config.tokenizer.name is not None:
        used, unused = config.tokenizer.path, config.tokenizer.name
        found.append(f"tokenizer.name: {unused!r} is not used, the tokenizer is tokenizer.path = {used!r}")
    if config.datacollator.pad_to_multiple_of is not None and config.datacollator.pack_sequences:
        value = config.datacollator.pad_to_multiple_of
        found.append(
            f"datacollator.pad_to_multiple_of: {value} has no effect with datacollator.pack_sequences: true;"
            " packed rows always have dataset.max_seq_length slots"
        )
    if config.trainer.detect_anomaly:
        found.append(
            "trainer.detect_anomaly: true checks every operation of the backward pass, which takes several times as"
            " long; write false when the operation is found"
        )
    if config.model.ngpt:
        key = "scheduler.warmup_steps" if config.scheduler.warmup_percent is None else "scheduler.warmup_percent"
        if value := FIELDS[key].value_in(config):
            found.append(f"{key}: {value}, but the normalised model (model.ngpt: true) needs no warm-up; write 0")
    found += late_profiler(config, total_steps)
    return found + list(schedule_warnings(config, total_steps or config.trainer.max_steps))


def _check_ranges(config: Config) -> Iterator[str]:
    for rule, test, keys in _RANGES:
        for key in keys:
            value = FIELDS[key].value_in(config)
            if value not in (None, "auto") and not test(value):
                yield f"{key}: {list(value) if isinstance(value, tuple) else value} {rule}"


def _check_texts(config: Config) -> Iterator[str]:
    for field in FIELDS.values():
        if field.kind is str and field.value_in(config) == "":
            yield f"{field.key}: may not be empty" + ("; write null" if field.nullable else "")
    for key in (
        "model.init_from",
        "dataset.path",
        "tokenizer.path",
        "trainer.output_dir",
        "dataset.cache_dir",
        "wandb.dir",
        "contrastive.pretrained_checkpoint_dir",
        "contrastive.pretraining_dataset",
    ):
        value = FIELDS[key].value_in(config)
        if any("${" in text for text in ([value] if isinstance(value, str) else value or ())):
            yield f"{key}: {value!r} holds a reference that is not replaced; only ${{variables.x}} is"
    for text in config.trainer.fill_mask_texts or ():
        if "[MASK]" not in text:
            yield f"trainer.fill_mask_texts: {text!r} has no [MASK] to fill in"


def _check_model(config: Config) -> Iterator[str]:
    model = config.model
    size, heads = model.hidden_size, model.num_attention_heads
    if size >= 1 and heads >= 1:
        if size % heads:
            yield f"model.hidden_size: {size} is not a multiple of model.num_attention_heads = {heads}"
        elif model.rope and (size // heads) % 2:
            yield (
                f"model.hidden_size: {size} / model.num_attention_heads = {heads} gives heads of width {size // heads};"
                " model.rope needs an even width"
            )
    yield from variant_problems(model)
    if model.ngpt and config.optimizer.weight_decay > 0:
        yield (
            f"optimizer.weight_decay: {config.optimizer.weight_decay} does nothing with model.ngpt: true, whose"
            " matrices are scaled to length 1 after every step; write 0"
        )
    if model.init_drop_decoder_bias and model.decoder_bias:
        yield "model.init_drop_decoder_bias: true leaves out what model.decoder_bias: true needs; write false for one"
    if model.init_drop_decoder_bias and model.init_from is None:
        yield "model.init_drop_decoder_bias: true is about model.init_from, which is null; write false"
    if model.init_tile and model.init_from is None:
        yield "model.init_tile: true is about model.init_from, which is null; write false"
    if model.init_weights != "model" and model.init_from is None:
        yield f"model.init_weights: {model.init_weights} is about model.init_from, which is null; write model"
    if model.max_position_embeddings < config.dataset.max_seq_length:
        yield (
            f"model.max_position_embeddings: {model.max_position_embeddings} is less than dataset.max_seq_length ="
            f" {config.dataset.max_seq_length}; raise it, or lower the length"
        )
    if model.local_attention is None and model.global_attention_every != 3:
        yield (
            f"model.global_attention_every: {model.global_attention_every} has no effect without"
            " model.local_attention; set the window, or remove this key"
        )
    if config.trainer.gradient_checkpointing_every != 1 and not config.trainer.gradient_checkpointing:
        yield (
            f"trainer.gradient_checkpointing_every: {config.trainer.gradient_checkpointing_every} has no effect"
            " without trainer.gradient_checkpointing: true; set that, or remove this key"
        )


_OF_TOKEN_PREDICTION = (
    "model.kernel_backend",
    "datacollator.mask_all",
    "datacollator.mask_fraction",
    "datacollator.random_fraction",
    "trainer.masked_logits_only_loss",
    "trainer.z_loss",
    "trainer.fill_mask_texts",
)
"""Keys that only objectives with a loss over the vocabulary read."""


def _check_objective(config: Config) -> Iterator[str]:
    if config.trainer.objective != "replaced_token":
        return
    for key in _OF_TOKEN_PREDICTION:
        if (value := FIELDS[key].value_in(config)) not in (FIELDS[key].default, ()):
            shown = list(value) if isinstance(value, tuple) else value
            yield f"{key}: {shown} has no effect with trainer.objective: replaced_token; remove it"
    if config.model.ngpt:
        yield (
            "model.ngpt: true has no form of the head that trainer.objective: replaced_token trains; write false, or"
            " trainer.objective: mlm"
        )


def _check_budget(config: Config) -> Iterator[str]:
    given = [f"{key} = {FIELDS[key].value_in(config)}" for key in BUDGETS if FIELDS[key].value_in(config) is not None]
    if len(given) != 1:
        named = " and ".join(given) if given else "none"
        yield f"trainer.max_steps: set exactly one of {', '.join(BUDGETS)}; this config sets {named}"


def _check_batch(config: Config) -> Iterator[str]:
    trainer = config.trainer
    total, rows = trainer.global_batch_size, trainer.per_device_train_batch_size
    if total is None or total < 1 or (rows != "auto" and rows < 1):
        return
    if trainer.gradient_accumulation_steps is not None:
        yield (
            f"trainer.gradient_accumulation_steps: {trainer.gradient_accumulation_steps} is set beside"
            f" trainer.global_batch_size = {total}, which derives it; write null for one of the two"
        )
    if rows != "auto" and total % rows:
        below, above = total // rows * rows, math.ceil(total / rows) * rows
        yield (
            f"trainer.global_batch_size: {total} is not a multiple of trainer.per_device_train_batch_size = {rows};"
            f" write {f'{below} or ' if below else ''}{above}"
        )


def _check_logging(config: Config) -> Iterator[str]:
    if config.trainer.log_statistics and config.trainer.logging_steps == 0:
        yield "trainer.log_statistics: true has no effect with trainer.logging_steps = 0; log, or write false"


def _check_device(config: Config) -> Iterator[str]:
    backend, kernel = config.model.attn_backend, config.model.kernel_backend
    if config.trainer.use_cpu:
        if backend in ("flash_attn_varlen", "flex"):
            remedy = "write model.attn_backend: auto"
            yield f"model.attn_backend: {backend} needs a GPU, but trainer.use_cpu is true; {remedy}"
        if kernel == "liger":
            remedy = "write model.kernel_backend: auto"
            yield f"model.kernel_backend: liger needs a GPU, but trainer.use_cpu is true; {remedy}"
    elif backend == "flash_attn_varlen" and config.trainer.mixed_precision == "no":
        yield (
            "model.attn_backend: flash_attn_varlen needs trainer.mixed_precision: bf16, it is no;"
            " write model.attn_backend: auto"
        )
    if config.dataset.pin_memory and config.trainer.use_cpu:
        yield "dataset.pin_memory: true needs a GPU, but trainer.use_cpu is true; write null"


_RULES = (
    _check_ranges,
    _check_texts,
    _check_model,
    _check_objective,
    check_dataset,
    check_tokenizer,
    check_rows,
    check_optimizer,
    _check_budget,
    _check_batch,
    check_automatic_batch,
    check_profiler,
    check_saving,
    check_resume_allow,
    check_schedule,
    check_batch_warmup,
    check_masks,
    check_rollback,
    _check_logging,
    check_average,
    _check_device,
    check_contrastive,
)
