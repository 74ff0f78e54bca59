"""The parts of a run that are derived from the config and from each other; `run.build_run` puts them together."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from neobert.config.schema import Config
from neobert.config.schema_optimizer import MUON
from neobert.config.schema_trainer import TrainerSection
from neobert.data.pipeline import DataPipeline, Reader, build_data
from neobert.data.rows.batch_size import BatchSchedule
from neobert.data.rows.order import key
from neobert.data.tokenizer import Tokenizer, padded_vocab_size
from neobert.data.words import build_word_edges
from neobert.errors import StartupError
from neobert.kernels.linear_cross_entropy import KERNELS, choose_kernel, compiled_linear_cross_entropy
from neobert.model.attention import AttentionBackend, choose_attention
from neobert.model.config import Architecture, ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.fp8 import FP8_PRODUCTS, use_fp8
from neobert.model.hub_encoder import build_encoder_of
from neobert.objectives.base import ObjectiveModule, Teacher
from neobert.objectives.causal_lm import build_next_tokens
from neobert.objectives.masking import MaskPolicy
from neobert.objectives.table import choose_objective
from neobert.objectives.token_weights import TokenWeights
from neobert.optim.moving_average import WeightAverage
from neobert.optim.muon import Muon
from neobert.optim.optimizers import build_optimizer, keep_unit_length
from neobert.optim.qk_clip import QKClip
from neobert.optim.sharded_weights import is_sharded, whole
from neobert.train.hardware.device import choose_device_type
from neobert.train.hardware.machine import Runtime, choose_compile, compute_dtype
from neobert.train.master_weights import MasterWeights
from neobert.train.record.console import Reporter
from neobert.train.record.trackers import TRACKERS, TrackerSink, choose_trackers
from neobert.weights.vocabulary import VOCABULARY_TENSORS


def choose_rows_per_step(config: Config, world: int) -> int:
    """Global batch in rows, after a warm-up of the batch: micro-batch x accumulation x processes.

    Raises:
        StartupError: `trainer.global_batch_size` or `trainer.batch_size_warmup_start` is no multiple of micro-batch x
            processes, or the second is no smaller than the full batch.
    """
    trainer = config.trainer
    if trainer.per_device_train_batch_size == "auto":
        return _check_shared_evenly(trainer, world)
    per_micro_step = trainer.per_device_train_batch_size * world
    for name, rows in (
        ("global_batch_size", trainer.global_batch_size),
        ("batch_size_warmup_start", trainer.batch_size_warmup_start),
    ):
        if rows is not None and rows % per_micro_step:
            raise StartupError(
                f"trainer.{name}: {rows} is no multiple of "
                f"trainer.per_device_train_batch_size x processes = {trainer.per_device_train_batch_size} x {world}; "
                f"the next one that is: {math.ceil(rows / per_micro_step) * per_micro_step}"
            )
    full = trainer.global_batch_size or per_micro_step * (trainer.gradient_accumulation_steps or 1)
    start = trainer.batch_size_warmup_start
    if start is not None and start >= full:
        raise StartupError(
            f"trainer.batch_size_warmup_start: {start} rows are no fewer than the {full} rows of the full batch; lower "
            "it, raise trainer.gradient_accumulation_steps, or remove the warm-up"
        )
    return full


def _check_shared_evenly(trainer: TrainerSection, world: int) -> int:
    rows_per_step = trainer.global_batch_size
    assert rows_per_step is not None, "auto is valid beside trainer.global_batch_size only"
    for name, rows in (
        ("global_batch_size", rows_per_step),
        ("batch_size_warmup_start", trainer.batch_size_warmup_start),
    ):
        if rows is not None and rows % world:
            raise StartupError(
                f"trainer.{name}: {rows} cannot be shared evenly by {world} processes; write "
                f"{math.ceil(rows / world) * world}"
            )
    return rows_per_step


def build_attention(config: Config) -> AttentionBackend:
    """The attention backend of this machine.

    Raises:
        StartupError: `model.attn_backend` names one that cannot run here.
    """
    device, dtype = torch.device(choose_device_type(config)), compute_dtype(config)
    backend, head_dim = config.model.attn_backend, config.model.head_dim
    try:
        return choose_attention(backend, device=device, dtype=dtype, head_dim=head_dim)
    except ValueError as error:
        raise StartupError(str(error)) from error


def build_model_config(config: Config, tokenizer: Tokenizer, hub: ModelConfig | None = None) -> ModelConfig:
    """The architecture, with the vocabulary and the padding id of the tokenizer; `hub`, an encoder of transformers, has
    its own.

    Raises:
        DataError: `model.vocab_size` is smaller than the tokenizer.
        StartupError: a key is about blocks of ours, and `hub` has others.
    """
    if hub is not None:
        trainer = config.trainer
        if trainer.fp8 != "no":
            raise StartupError(f"trainer.fp8: {trainer.fp8} is for encoders of ours, not of transformers; write no")
        if trainer.bf16_residual:
            raise StartupError("trainer.bf16_residual: true is for encoders of ours, not of transformers; write false")
        return hub
    vocab_size = padded_vocab_size(config.model.vocab_size, tokenizer.size)
    architecture = {f.name: getattr(config.model, f.name) for f in fields(Architecture)}
    return ModelConfig(**architecture, vocab_size=vocab_size, pad_token_id=tokenizer.pad_id)


def build_mask_policy(tokenizer: Tokenizer, probability: float, *, mask_all: bool) -> MaskPolicy:
    """Which tokens are predicted and what replaces them."""
    return MaskPolicy(
        probability=probability,
        mask_all=mask_all,
        mask_token_id=tokenizer.mask_id,
        special_ids=tokenizer.special_ids,
        random_ids=tokenizer.random_ids,
    )


def build_train_masks(config: Config, tokenizer: Tokenizer) -> MaskPolicy:
    """The masks of training. Where their fraction ends with the run, its length is still to be added.

    Raises:
        DataError: masks follow words, and the tokenizer does not show where they begin.
    """
    section = config.datacollator
    return replace(
        build_mask_policy(tokenizer, section.mlm_probability, mask_all=section.mask_all),
        mask_fraction=section.mask_fraction,
        random_fraction=section.random_fraction,
        final_probability=section.mlm_probability_final,
        final_step=section.mlm_probability_final_step,
        units=section.mask_units,
        span_max_words=section.span_max_words,
        draw_rate=section.mlm_rate,
        rate_range=section.mlm_rate_range,
        edges=None if section.mask_units == "tokens" else build_word_edges(tokenizer),
        token_weights=None
        if section.mask_weights == "uniform"
        else TokenWeights(tokenizer.size, section.mask_weights_steps),
    )


def choose_mask_end(config: Config, num_steps: int) -> int | None:
    """The step at which the fraction of masked tokens reaches its final value; None when it is constant."""
    section = config.datacollator
    return None if section.mlm_probability_final is None else section.mlm_probability_final_step or num_steps


def build_config_data(config: Config, tokenizer: Tokenizer, reader: Reader) -> DataPipeline:
    """What one process of a run with this config reads, masked as the config says; see `build_data`.

    Raises:
        DataError: the data cannot be used as configured.
        StartupError: the fraction of masked tokens changes until the end of the run, whose length cannot be known.
    """
    masks, corrupt = build_train_masks(config, tokenizer), choose_objective(config).corrupt
    clm_steps = config.datacollator.clm_steps
    data = build_data(
        config,
        tokenizer,
        reader,
        train_masks=corrupt(masks),
        eval_masks=corrupt(build_mask_policy(tokenizer, config.datacollator.eval_mlm_probability, mask_all=False)),
    )
    if masks.draw_rate != "fixed":
        data = replace(data, collate=replace(data.collate, varying_targets=True))
    if clm_steps is not None:
        data = replace(
            data, collate=replace(data.collate, first_policy=build_next_tokens(masks), first_steps=clm_steps)
        )
    if masks.final_probability is None or masks.final_step is not None:
        return data
    masks = replace(masks, final_step=choose_mask_end(config, choose_num_steps(config, data)))
    return replace(data, collate=replace(data.collate, policy=corrupt(masks)))


def build_run_optimizer(config: Config, module: ObjectiveModule) -> Optimizer:
    """The optimizer over all weights. Orthogonal factors are computed in the type of all matrix products. With
    `model.ngpt` it scales the matrices to length 1 after every step."""
    optimizer = build_optimizer(
        module,
        config.optimizer,
        dtype=compute_dtype(config),
        layer_decay=config.finetune.layer_lr_decay,
        num_layers=len(module.encoder.layers),
        num_heads=module.encoder.config.num_attention_heads,
    )
    # Scaled again, a matrix that is not trained would differ by a rounding error.
    keep_unit_length(optimizer, [matrix for matrix in module.unit_matrices() if matrix[0].requires_grad])
    return optimizer


def share_factors(optimizer: Optimizer, runtime: Runtime) -> None:
    """Has the processes of a run, which have the same weights and gradients, share the work of Muon's orthogonal
    factors."""
    if isinstance(optimizer, Muon) and runtime.world > 1:
        optimizer.share(dist.group.WORLD)


def build_clip(
    config: Config, module: ObjectiveModule, computing: ObjectiveModule, optimizer: Optimizer, runtime: Runtime
) -> QKClip | None:
    """What clips attention logits after the steps of `optimizer`, None where nothing does."""
    muon = config.optimizer.muon_config
    if config.optimizer.name not in MUON or not muon.enable_clipping or config.trainer.trained_weights != "all":
        return None
    clip = QKClip(module.encoder, muon, computing=computing.encoder, largest=runtime.max_on_device)
    clip.clip_after(optimizer)
    return clip


def build_average(config: Config, module: ObjectiveModule) -> WeightAverage | None:
    """The moving average of the weights that the config asks for."""
    trainer = config.trainer
    if trainer.ema_decay is None:
        return None
    return WeightAverage(module, decay=trainer.ema_decay, start_step=trainer.ema_start_step)


def build_module(
    config: Config,
    model_config: ModelConfig,
    attention: AttentionBackend,
    runtime: Runtime,
    teacher: Teacher | None = None,
) -> ObjectiveModule:
    """The module of the config's objective with its initial weights, which depend on `seed` alone, on the device; it
    learns from `teacher` where there is one.

    Raises:
        StartupError: the config does not fit the architecture.
    """
    name = choose_kernel(config.model.kernel_backend, device=runtime.device)
    inductor = choose_compile(config) and config.trainer.torch_compile_backend == "inductor"
    kernel = KERNELS[name]
    if name == "torch" and runtime.device.type == "cuda" and inductor:
        kernel = compiled_linear_cross_entropy
    encoder = build_encoder(config, model_config, attention)
    if config.trainer.fp8 != "no":
        use_fp8(encoder, FP8_PRODUCTS[config.trainer.fp8])
    module = choose_objective(config).build_module(encoder, config, kernel)
    if teacher is not None:
        module.learn_from(teacher)
    if config.trainer.trained_weights == "embeddings":
        train_vocabulary_only(module)
    return module.to(runtime.device)


def train_vocabulary_only(module: ObjectiveModule) -> None:
    """Has everything but the rows of tokens stay as it is."""
    for name, weight in module.named_parameters():
        if name not in VOCABULARY_TENSORS:
            weight.requires_grad_(False)


@torch.no_grad()
def gather_module(
    config: Config,
    model_config: ModelConfig,
    attention: AttentionBackend,
    runtime: Runtime,
    module: ObjectiveModule,
    *,
    teacher: Teacher | None,
    keep: bool,
) -> ObjectiveModule:
    """`module`; where its weights are sharded, a copy with all of them on the ranks that `keep` one. Collective."""
    weights = module.state_dict()
    if not any(map(is_sharded, weights.values())):
        return module
    copy = build_module(config, model_config, attention, runtime, teacher).train(module.training) if keep else module
    targets = copy.state_dict() if keep else {}
    for name, weight in weights.items():
        full = whole(weight)
        if keep:
            targets[name].copy_(full)
    return copy


def build_model(config: Config, module: ObjectiveModule) -> nn.Module:
    """`module` as it computes: with weights in bf16 where it holds their masters, and compiled if asked for."""
    model = MasterWeights(module) if config.trainer.bf16_residual else module
    compile_blocks(config, computing_module(model).encoder)
    return model


def computing_module(model: nn.Module) -> ObjectiveModule:
    """What of a result of `build_model` computes."""
    computing = model.computing if isinstance(model, MasterWeights) else model
    assert isinstance(computing, ObjectiveModule)
    return computing


def build_encoder(config: Config, model_config: ModelConfig, attention: AttentionBackend) -> Encoder:
    """An encoder with its initial weights; what is made after it, with the same generator, depends on `seed` too."""
    torch.manual_seed(key(config.seed, "init") % 2**63)
    return build_encoder_of(
        model_config,
        attention,
        gradient_checkpointing=config.trainer.gradient_checkpointing,
        gradient_checkpointing_every=config.trainer.gradient_checkpointing_every,
    )


def compile_blocks(config: Config, encoder: Encoder) -> None:
    """Compiles the blocks if `trainer.torch_compile` says so.

    One at a time: all blocks use one compiled graph, so the start is fast; in place, so that names stay. Gradients
    are reduced between blocks anyway: the compiler must not cut a block where DistributedDataParallel's buckets end.
    """
    if not choose_compile(config):
        return
    torch._dynamo.config.optimize_ddp = False
    for block in encoder.layers:
        block.compile(
            backend=config.trainer.torch_compile_backend,
            dynamic=bool(config.trainer.torch_compile_dynamic),
            options=choose_compile_options(config),
        )


def choose_compile_options(config: Config) -> dict[str, str | int | bool] | None:
    """With `trainer.deterministic`, no kernel of inductor is chosen by how fast it happened to run."""
    if config.trainer.deterministic and config.trainer.torch_compile_backend == "inductor":
        return {"max_autotune": False, "deterministic": True}
    return None


class Sized(Protocol):
    """Data whose size may be known."""

    @property
    def batch(self) -> BatchSchedule: ...

    @property
    def num_rows(self) -> int | None: ...

    @property
    def num_tokens(self) -> int | None: ...


def choose_num_steps(config: Config, data: Sized) -> int:
    """The budget in optimizer steps; `max_tokens` and epochs count row slots, those of smaller first steps too.

    Raises:
        StartupError: epochs of a source whose size is not known.
    """
    trainer, length = config.trainer, config.dataset.max_seq_length
    if trainer.max_steps is not None:
        return trainer.max_steps
    if trainer.max_tokens is not None:
        return data.batch.steps_for(trainer.max_tokens, per_row=length)
    assert trainer.num_train_epochs is not None, "the config names exactly one budget"
    if data.num_rows is not None:  # One piece of a document is one row of the batch: no slots to count.
        return data.batch.steps_for(trainer.num_train_epochs * data.num_rows)
    if data.num_tokens is None:
        raise StartupError(
            f"trainer.num_train_epochs: {trainer.num_train_epochs} needs a source of known size, and this one is a "
            "stream; set dataset.streaming: false to tokenise it once, or use trainer.max_steps or trainer.max_tokens"
        )
    return data.batch.steps_for(trainer.num_train_epochs * data.num_tokens, per_row=length)


def build_sinks(
    config: Config, runtime: Runtime, output_dir: Path, module: torch.nn.Module, reporter: Reporter
) -> list[TrackerSink]:
    """The trackers of rank 0, which start when the record begins."""
    if not runtime.is_main:
        return []
    names = choose_trackers(config)
    if config.requested_trackers and not names:
        reporter.warn(f"trainer.report_to: all finds none installed of {', '.join(TRACKERS)}")
    return [TRACKERS[name](config, output_dir, module) for name in names]
