"""What makes a config unusable, and what is allowed but probably not meant. Pure: nothing is read, nothing is changed.

What a key says of itself in the schema (its range, what it needs, who reads it) is checked here for all keys alike;
rules over several keys follow, those of data in `rules_data`. Each sentence starts
with a dotted key and names the value and the remedy.
"""

import math
from collections.abc import Iterator
from typing import Any

from neobert.config.fields import FIELDS, Field, can_be_declared, list_fields
from neobert.config.rules_data import (
    check_contrastive,
    check_dataset,
    check_jepa,
    check_masks,
    check_rows,
    check_tokenizer,
)
from neobert.config.rules_distill import check_distill
from neobert.config.rules_finetune import check_finetune, check_shapes
from neobert.config.rules_glue import check_glue
from neobert.config.rules_machine import check_device, check_parallel, check_trackers
from neobert.config.schema import Config, SchedulerSection
from neobert.config.schema_optimizer import MUON
from neobert.key import show_value
from neobert.model.config import architecture_problems, fp8_problems

BUDGETS = ("trainer.max_steps", "trainer.max_tokens", "trainer.num_train_epochs")
"""Exactly one of these is set."""


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
    causal, steps = config.datacollator.clm_steps, total_steps or config.trainer.max_steps
    if causal is not None and steps is not None and causal >= steps:
        found.append(
            f"datacollator.clm_steps: {causal} of {steps} steps leaves none with masks; lower it, or write"
            " trainer.objective: clm"
        )
    if config.trainer.trained_weights == "embeddings" and config.model.init_from is None:
        found.append(
            "trainer.trained_weights: embeddings leaves all other weights as they are, which without model.init_from"
            " are random; name the weights to start from, or write all"
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
    profiled = config.trainer.profiler_steps_start
    if profiled is not None and total_steps is not None and profiled > total_steps:
        found.append(
            f"trainer.profiler_steps_start: {profiled} is after the last step of the run, {total_steps}; nothing will"
            " be profiled"
        )
    return found + list(warn_about_schedule(config, total_steps or config.trainer.max_steps))


# ---- what keys say of themselves ----


def check_ranges(config: Config) -> Iterator[str]:
    """Numbers out of the range of their key."""
    for field in FIELDS.values():
        yield from _check_range(field.key, field, field.value_in(config))


def _check_range(name: str, field: Field, value: Any) -> Iterator[str]:
    if field.item is not None:
        for number, item in enumerate(value):
            for part in list_fields(field.item):
                yield from _check_range(f"{name}: [{number}].{part.key}", part, getattr(item, part.key))
    elif field.known.has_range:
        yield from field.known.range_problems(name, value)


def check_needs(config: Config) -> Iterator[str]:
    """Keys that have no effect with the rest of the config: of another task too."""

    def read(key: str) -> Any:
        return FIELDS[key].value_in(config)

    for key, field in FIELDS.items():
        value = read(key)
        unmet = () if value == field.default else [need for need in field.needs if not need.holds(read)]
        if unmet:
            shown = show_value(value) if field.item is None else "a list"
            yield f"{key}: {shown} has no effect {unmet[0].reason(read)}; {unmet[0].remedy}"


def check_texts(config: Config) -> Iterator[str]:
    """Texts that are empty, hold a reference that nothing replaces, or lack what they are for."""
    for field in FIELDS.values():
        value = field.value_in(config)
        if field.kind is str and value == "":
            yield f"{field.key}: may not be empty" + ("; write null" if field.nullable else "")
        if field.known.path and any("${" in text for text in ([value] if isinstance(value, str) else value or ())):
            yield f"{field.key}: {value!r} holds a reference that is not replaced; only ${{variables.x}} is"
    for text in config.trainer.fill_mask_texts or ():
        if "[MASK]" not in text:
            yield f"trainer.fill_mask_texts: {text!r} has no [MASK] to fill in"


# ---- rules over several keys ----


def check_model(config: Config) -> Iterator[str]:
    """The architecture, and what of `model.init_from` it takes."""
    model = config.model
    yield from architecture_problems(model)
    yield from fp8_problems(model) if config.trainer.fp8 != "no" else ()
    if model.ngpt and config.optimizer.weight_decay > 0:
        yield (
            f"optimizer.weight_decay: {config.optimizer.weight_decay} does nothing with model.ngpt: true, whose"
            " matrices are scaled to length 1 after every step; write 0"
        )
    if model.ngpt and config.trainer.objective == "replaced_token":
        yield (
            "model.ngpt: true has no form of the head that trainer.objective: replaced_token trains; write false, or"
            " trainer.objective: mlm"
        )
    if model.init_drop_decoder_bias and model.decoder_bias:
        yield "model.init_drop_decoder_bias: true leaves out what model.decoder_bias: true needs; write false for one"
    if model.max_position_embeddings < config.dataset.max_seq_length:
        yield (
            f"model.max_position_embeddings: {model.max_position_embeddings} is less than dataset.max_seq_length ="
            f" {config.dataset.max_seq_length}; raise it, or lower the length"
        )


def check_optimizer(config: Config) -> Iterator[str]:
    """Keys that contradict `optimizer.name` or the model."""
    section, muon = config.optimizer, "optimizer.muon_config"
    if section.name in MUON:
        variant = "qk_norm" if config.model.qk_norm else "ngpt" if config.model.ngpt else None
        if section.muon_config.enable_clipping and variant:
            yield (
                f"{muon}.enable_clipping: true has nothing to clip with model.{variant}: true, whose queries and keys "
                f"have a fixed length; write {muon}.enable_clipping: false"
            )
        if section.groups.matrices.weight_decay is not None:
            yield (
                f"optimizer.groups.matrices.weight_decay: {section.groups.matrices.weight_decay} is written "
                f"{muon}.muon_decay with optimizer.name: {section.name}"
            )
    if section.name == "adam" and section.decoupled_weight_decay:
        yield (
            "optimizer.decoupled_weight_decay: true contradicts optimizer.name: adam, whose decay is part of the "
            "gradient; write adamw"
        )


def check_budget(config: Config) -> Iterator[str]:
    """One budget, and a profile within it."""
    explicit = [
        f"{key} = {FIELDS[key].value_in(config)}" for key in BUDGETS if FIELDS[key].value_in(config) is not None
    ]
    has_default = config.task == "glue" and not explicit  # The epochs of the grid.
    if len(explicit) != 1 and not has_default:
        named = " and ".join(explicit) if explicit else "none"
        yield f"trainer.max_steps: set exactly one of {', '.join(BUDGETS)}; this config sets {named}"
    start, steps = config.trainer.profiler_steps_start, config.trainer.max_steps
    if start is not None and steps is not None and start > steps:
        yield (
            f"trainer.profiler_steps_start: {start} is after the last step, trainer.max_steps = {steps}; choose an"
            " earlier one"
        )


def check_batch(config: Config) -> Iterator[str]:
    """Rows of a step and of a micro-batch."""
    trainer = config.trainer
    total, rows = trainer.global_batch_size, trainer.per_device_train_batch_size
    if rows == "auto":
        yield from _check_automatic_batch(config)
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


def _check_automatic_batch(config: Config) -> Iterator[str]:
    """The machine may decide about micro-batches, never about what is trained on."""
    if config.task != "pretraining":
        yield (
            "trainer.per_device_train_batch_size: auto measures steps of pretraining; write the rows that go through"
            f" the encoder at once with task: {config.task}"
        )
    if config.trainer.global_batch_size is None:
        yield (
            "trainer.per_device_train_batch_size: auto needs trainer.global_batch_size, or the memory of the machine"
            " would decide how many rows a step has; set it, or write a number"
        )
    if config.datacollator.pack_sequences and not config.trainer.enforce_full_packed_batches:
        yield (
            "trainer.per_device_train_batch_size: auto needs trainer.enforce_full_packed_batches: true, since without"
            " it each micro-batch is packed by itself; write true there, or a number here"
        )


def check_saving(config: Config) -> Iterator[str]:
    """The best checkpoint needs evaluations; keys that may be declared to change on resume."""
    trainer = config.trainer
    evaluates = trainer.eval_strategy == "steps" and trainer.eval_steps >= 1
    saves = trainer.save_best and trainer.save_model and trainer.save_strategy == "steps" and trainer.save_steps >= 1
    if saves and not (evaluates and trainer.save_steps % trainer.eval_steps == 0):
        yield (
            f"trainer.save_best: true needs an evaluation at every save, but trainer.save_steps = {trainer.save_steps}"
            f" is not a multiple of trainer.eval_steps = {trainer.eval_steps if evaluates else 0}; make it one"
        )
    for key in trainer.resume_allow:
        if key not in FIELDS:
            known = ", ".join(name for name, field in FIELDS.items() if can_be_declared(field))
            yield f"trainer.resume_allow: {key} is no key; the keys that can be declared are {known}"
        elif FIELDS[key].known.resume == "fixed":
            yield f"trainer.resume_allow: {key} can never change on resume: start a new run with it"
        elif not can_be_declared(FIELDS[key]):
            yield f"trainer.resume_allow: {key} may change without being declared; remove it"


def check_average(config: Config) -> Iterator[str]:
    """The moving average of the weights."""
    trainer = config.trainer
    start, steps = trainer.ema_start_step, trainer.max_steps
    if trainer.ema_decay is not None and steps is not None and start >= max(steps, 1):
        yield (
            f"trainer.ema_start_step: {start} is not before the end of the run at trainer.max_steps = {steps}; lower it"
        )
    if trainer.ema_decay is not None and config.model.ngpt:
        yield (
            f"trainer.ema_decay: {trainer.ema_decay}, but the mean of vectors of length 1 is shorter, and those of"
            " model.ngpt: true must have length 1; remove it"
        )


FILL_THE_RUN = ("cosine", "linear")
"""Schedules whose decay takes all the time from the warm-up on; the others may have a cool-down."""


def check_schedule(config: Config) -> Iterator[str]:
    """Errors of `scheduler`."""
    schedule = config.scheduler
    for unit in ("steps", "percent"):
        warmup_key, decay_key = f"scheduler.warmup_{unit}", f"scheduler.decay_{unit}"
        warmup, decay = FIELDS[warmup_key].value_in(config), FIELDS[decay_key].value_in(config)
        wins = unit == "percent" or (schedule.warmup_percent is None and schedule.decay_percent is None)
        if wins and warmup is not None and decay is not None and decay <= warmup:
            yield (
                f"{decay_key}: {decay} is where the decay ends, counted from the start of the run, so it must be"
                f" greater than {warmup_key} = {warmup}"
            )
    yield from _check_cooldown(config)


def _check_cooldown(config: Config) -> Iterator[str]:
    schedule = config.scheduler
    explicit = schedule.cooldown_steps is not None or schedule.cooldown_percent is not None
    if schedule.name == "wsd" and not explicit:
        yield (
            "scheduler.cooldown_percent: null, but scheduler.name: wsd needs the length of its decay; write 10, or"
            " scheduler.cooldown_steps, or scheduler.name: constant for a run without one"
        )
    if explicit and schedule.name not in FILL_THE_RUN:
        yield from _check_room(schedule)


def _check_room(schedule: SchedulerSection) -> Iterator[str]:
    if schedule.cooldown_percent is not None:
        if schedule.warmup_percent is not None:
            end = 100 if schedule.decay_percent is None else schedule.decay_percent
            if schedule.cooldown_percent + schedule.warmup_percent > end:
                yield (
                    f"scheduler.cooldown_percent: {schedule.cooldown_percent} + scheduler.warmup_percent ="
                    f" {schedule.warmup_percent} is more than the end of the decay, {end}; lower one of them"
                )
    elif schedule.cooldown_steps is not None and schedule.warmup_percent is None and schedule.decay_percent is None:
        end_step = schedule.decay_steps
        if end_step is not None and schedule.cooldown_steps + schedule.warmup_steps > end_step:
            yield (
                f"scheduler.cooldown_steps: {schedule.cooldown_steps} + scheduler.warmup_steps ="
                f" {schedule.warmup_steps} is more than scheduler.decay_steps = {end_step}, where the decay ends; lower"
                " one of them"
            )


def warn_about_schedule(config: Config, steps: int | None) -> Iterator[str]:
    """What of the schedule does not fit into a run of `steps`; nothing when their number is not known."""
    schedule = config.scheduler
    if steps is None:
        return
    reference = schedule.total_steps or steps
    key, warmup = "scheduler.warmup_steps", schedule.warmup_steps
    if schedule.warmup_percent is not None:
        key, warmup = "scheduler.warmup_percent", int(reference * schedule.warmup_percent / 100)
    if warmup > steps:
        yield (
            f"{key}: the warm-up takes {warmup} steps but the run has {steps}: the learning rate never reaches"
            " optimizer.lr; lower it, or write scheduler.warmup_percent"
        )
    end = int(reference * schedule.decay_percent / 100) if schedule.decay_percent is not None else schedule.decay_steps
    end = end if end is not None else reference
    decays = schedule.name in FILL_THE_RUN or schedule.cooldown_steps or schedule.cooldown_percent
    if end > steps and warmup <= steps and decays:
        yield (
            f"scheduler: the decay ends at step {end} but the run has {steps} steps: the learning rate will not reach"
            " optimizer.lr * scheduler.final_lr_ratio"
        )
    cooldown, room = schedule.cooldown_steps, end - min(warmup, reference)
    if cooldown is not None and schedule.cooldown_percent is None and cooldown > room and warmup <= steps:
        yield (
            f"scheduler.cooldown_steps: {cooldown}, but there are only {room} steps between the warm-up and the end of"
            f" the decay at step {end}: the cool-down is cut to them; lower it, or write scheduler.cooldown_percent"
        )


def check_batch_warmup(config: Config) -> Iterator[str]:
    """Errors of `trainer.batch_size_warmup_*`."""
    trainer = config.trainer
    start, rows = trainer.batch_size_warmup_start, trainer.per_device_train_batch_size
    if start is None or start < 1:
        return
    if rows != "auto" and rows >= 1 and start % rows:
        yield (
            f"trainer.batch_size_warmup_start: {start} is not a multiple of trainer.per_device_train_batch_size ="
            f" {rows}; write {-(-start // rows) * rows}"
        )
    total = trainer.global_batch_size
    if total is not None and start >= total:
        yield (
            f"trainer.batch_size_warmup_start: {start} rows are no fewer than trainer.global_batch_size = {total};"
            " lower it, or remove the warm-up"
        )


_RULES = (
    check_ranges,
    check_needs,
    check_texts,
    check_model,
    check_dataset,
    check_tokenizer,
    check_rows,
    check_masks,
    check_optimizer,
    check_budget,
    check_batch,
    check_saving,
    check_schedule,
    check_batch_warmup,
    check_average,
    check_jepa,
    check_device,
    check_parallel,
    check_trackers,
    check_contrastive,
    check_distill,
    check_shapes,
    check_finetune,
    check_glue,
)
