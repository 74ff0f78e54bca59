"""Memory, speed and days of a run on GPUs that are not here: computed, not measured.

Memory is counted on fake tensors, which have a shape and no content: weights, gradients, what the optimizer keeps after
a step, and what a forward keeps for its backward, of this code and this config. Time is a model of the step:

    products        FLOP of the blocks' matrices over half of the peak
    attention       its FLOP over a third of the peak
    the rest        what a compiled step reads and writes between products, over 60% of the memory's bandwidth
    loss            its products, and six passes over the logits
    optimizer       its state, weights and gradients once read and once written, and the products of Muon
    exchange        bytes of gradients and weights over the links; four fifths of it are hidden by the computing

The fractions are those of well-tuned code on such GPUs, by other people's measurements; a step here may be a quarter
faster or slower. Bandwidths are those of data sheets.
"""

import itertools
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from neobert.benchmark.ledger import Ledger, build_fake_module, measure_ledger
from neobert.benchmark.settings import StepSettings
from neobert.benchmark.step_batches import RowShape, made_up_policy, make_batches, make_documents
from neobert.benchmark.step_time import RowSource
from neobert.config.schema import Config
from neobert.errors import StartupError
from neobert.model.config import Architecture, ModelConfig
from neobert.model.peak import GPUS, PEAKS
from neobert.objectives.base import ObjectiveModule
from neobert.objectives.table import choose_objective
from neobert.optim.optimizers import build_optimizer

PARALLEL = ("ddp", "fsdp2", "hsdp")

_PRODUCTS, _ATTENTION, _BANDWIDTH, _HIDDEN = 0.5, 0.33, 0.6, 0.8
_LOGIT_PASSES = 6
_RESERVED = 0.08
"""Of the memory: the context of CUDA, the libraries, and what the allocator cannot use."""

_LOGITS = 512 << 20
"""Of a chunk of the loss."""

_LAUNCH_SECONDS = 5e-6
_SAMPLE_SLOTS, _SAMPLE_ROWS = 8192, 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What the run would be on."""

    gpu: str
    num_gpus: int
    per_node: int = 8
    shard_size: int | None = None
    """GPUs that share one copy of the weights with hsdp; None: those of a node."""

    network: float = 50e9
    """Bytes a second between nodes, of each GPU, one direction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CountedModel:
    """What is counted once for a config."""

    weights: int
    """Numbers."""

    root_weights: int
    """Of these outside of the blocks."""

    num_blocks: int
    optimizer_bytes: int
    optimizer_flops: float
    averages: bool
    copies_bf16: bool
    """`trainer.bf16_residual`: bf16 weights beside their masters."""

    saved_bytes_per_slot: float
    again_bytes_per_slot: float
    """Of one block that is computed again; 0 where none is."""

    moved_bytes_per_slot: float
    launches: int
    """Of a micro-batch."""

    again: float
    """How many times the products of the blocks are made, by what checkpointing makes again."""

    keeps_blocks: bool
    """Whether sharded blocks stay gathered between forward and backward."""

    block_flops: float
    """A slot, forward and backward, what is computed again included; like the next two."""

    attention_flops: float
    loss_flops: float
    logits_per_slot: float
    length: int
    slots: float | None
    """Of the whole run; None where epochs decide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """One way to run it; bytes are those of a GPU."""

    parallel: str
    gpu: str
    num_gpus: int
    micro_batch_rows: int
    """0: not even one row fits."""

    accumulation: int
    weights: float
    gradients: float
    optimizer: float
    average: float
    gathered: float
    """Weights and gradients of blocks that are whole for a while."""

    activations: float
    loss: float
    reserved: float
    capacity: float
    slots_per_second: float
    mfu: float
    days: float | None
    gpu_hours: float | None

    @property
    def total(self) -> float:
        """All of the memory."""
        parts = (self.weights, self.gradients, self.optimizer, self.average, self.gathered, self.activations)
        return sum(parts) + self.loss + self.reserved


MEAN_DOCUMENT = 250.0
"""Tokens of a document, where nobody says how many."""


def size_config(
    config: Config,
    cluster: Cluster,
    parallel: str | None,
    vocab_size: int | None,
    mean_document: float = MEAN_DOCUMENT,
) -> list[Size]:
    """The config on the cluster, with one engine or with each, for documents of so many tokens on average.

    Raises:
        StartupError: the size of the vocabulary is not known, or the global batch cannot be shared evenly.
    """
    rows = config.trainer.global_batch_size
    if rows is None:
        rows = config.trainer.micro_batch_rows * cluster.num_gpus * (config.trainer.gradient_accumulation_steps or 1)
    if rows % cluster.num_gpus:
        raise StartupError(
            f"trainer.global_batch_size: {rows} cannot be shared evenly by {cluster.num_gpus} GPUs; write "
            f"{math.ceil(rows / cluster.num_gpus) * cluster.num_gpus}, or another --gpus"
        )
    if config.trainer.mixed_precision == "no":
        raise StartupError("trainer.mixed_precision: no is not computed here; write bf16 or auto")
    cluster = replace(cluster, shard_size=config.trainer.shard_size)
    parallel = parallel or (None if config.trainer.parallel == "auto" else config.trainer.parallel)
    parts = _num_parts(cluster, "hsdp")
    if parallel == "hsdp" and cluster.num_gpus % parts:
        raise StartupError(
            f"trainer.shard_size: groups of {parts} do not divide {cluster.num_gpus} GPUs; write a divisor, or another "
            "--gpus or --gpus-per-node"
        )
    model = count_model(config, vocab_size, mean_document, rows=rows)
    # What does not differ on so few GPUs is left out.
    differ = 1 if cluster.num_gpus == 1 else 2 if cluster.num_gpus <= cluster.per_node else 3
    engines = (parallel,) if parallel is not None else PARALLEL[:differ]
    fitting = [engine for engine in engines if engine != "hsdp" or cluster.num_gpus % parts == 0]
    return [choose_size(model, cluster, engine, rows) for engine in fitting]


# --- counted on fake tensors -----------------------------------------------------------------------------------------


def count_model(
    config: Config, vocab_size: int | None, mean_document: float = MEAN_DOCUMENT, *, rows: int | None = None
) -> CountedModel:
    """Counts what a step of the config needs, over rows of made-up documents; `rows` are those of a step where
    the config leaves them to the number of processes."""
    trainer, length = config.trainer, config.dataset.max_seq_length
    settings = StepSettings(
        length=length,
        rows=max(1, _SAMPLE_SLOTS // length),
        mean_document=mean_document,
        bf16_residual=trainer.bf16_residual,
        fp8="no" if trainer.fp8 == "no" else "rowwise",
    )
    source, attended = _build_rows(config, settings, vocab_size)
    ledger = measure_ledger(settings, source)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = build_fake_module(source, settings)
        optimizer = build_optimizer(module, config.optimizer, dtype=torch.bfloat16)
        for weight in module.parameters():
            weight.grad = torch.empty_like(weight)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        kept = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        optimizer_bytes = sum(x.numel() * x.element_size() for x in kept)
    optimizer_flops = counter.get_total_flops()
    return _describe_model(
        config, source, attended, ledger, module, optimizer_bytes, optimizer_flops, rows or trainer.global_batch_size
    )


def _build_rows(config: Config, settings: StepSettings, vocab_size: int | None) -> tuple[RowSource, float]:
    """Rows, and the mean length of the document of a token."""
    objective = choose_objective(config)
    if objective.reads != "documents":
        raise StartupError(f"{objective.title} reads {objective.reads}: only runs over documents can be sized")
    size = vocab_size or config.model.vocab_size or config.tokenizer.vocab_size
    if size is None:
        raise StartupError("model.vocab_size: null leaves the size to the tokenizer; say it with --vocab-size N")
    architecture: dict[str, Any] = {f.name: getattr(config.model, f.name) for f in fields(Architecture)}
    model = ModelConfig(**architecture, vocab_size=math.ceil(size / 64) * 64, pad_token_id=0)
    documents = make_documents(
        _SAMPLE_ROWS * settings.length,
        mean=settings.mean_document,
        longest=settings.length,
        vocab_size=model.vocab_size,
    )
    policy = made_up_policy(model.vocab_size, config.datacollator.mlm_probability)
    shape = RowShape(rows=settings.rows, length=settings.length, packed=config.datacollator.pack_sequences)
    batches = itertools.cycle(make_batches(documents, shape, policy))
    lengths = np.array([len(document) for document in documents])
    attended = float(np.square(lengths).sum() / lengths.sum())
    return RowSource(model=model, batches=batches, name="made up", objective=objective, real=False), attended


def _describe_model(
    config: Config,
    source: RowSource,
    attended: float,
    ledger: Ledger,
    module: ObjectiveModule,
    optimizer_bytes: int,
    optimizer_flops: float,
    rows: int | None,
) -> CountedModel:
    trainer, model, encoder = config.trainer, source.model, module.encoder
    batch, num_blocks = next(source.batches), source.model.num_hidden_layers
    weights = sum(p.numel() for p in module.parameters())
    predicted, length = batch.num_targets / batch.num_tokens, config.dataset.max_seq_length
    products = encoder.flops_per_token(attended_length=0, predicted_fraction=0)
    attention = encoder.flops_per_token(attended_length=attended, predicted_fraction=0) - products
    loss = encoder.flops_per_token(attended_length=0, predicted_fraction=predicted) - products
    # A checkpointed block keeps its input, and makes its forward, a third of its products, twice.
    num_again = math.ceil(num_blocks / trainer.gradient_checkpointing_every) if trainer.gradient_checkpointing else 0
    again = 1 + num_again / num_blocks / 3
    saved = (num_blocks - num_again) * ledger.compiled_saved_bytes_per_slot
    saved += num_again * model.hidden_size * (2 if trainer.bf16_residual else 4)
    slots: float | None = None
    if trainer.max_tokens is not None:
        slots = trainer.max_tokens
    elif trainer.max_steps is not None and rows is not None:
        slots = trainer.max_steps * rows * length
    return CountedModel(
        weights=weights,
        root_weights=weights - sum(p.numel() for p in encoder.layers.parameters()),
        num_blocks=num_blocks,
        optimizer_bytes=optimizer_bytes,
        optimizer_flops=optimizer_flops,
        averages=trainer.ema_decay is not None,
        copies_bf16=trainer.bf16_residual,
        saved_bytes_per_slot=saved,
        again_bytes_per_slot=ledger.compiled_saved_bytes_per_slot if num_again else 0.0,
        moved_bytes_per_slot=num_blocks * ledger.fused_bytes_per_slot * again,
        launches=ledger.launches,
        again=again,
        keeps_blocks=not trainer.reshard_after_forward,
        block_flops=products * again,
        attention_flops=attention * again,
        loss_flops=loss,
        logits_per_slot=predicted * model.vocab_size,
        length=length,
        slots=slots,
    )


# --- computed --------------------------------------------------------------------------------------------------------


def choose_size(model: CountedModel, cluster: Cluster, parallel: str, rows: int) -> Size:
    """The largest micro-batch that fits, and what it comes to; rows of a step are `rows`."""
    share = rows // cluster.num_gpus
    fitting = [n for n in range(1, share + 1) if share % n == 0]
    sizes = (_size(model, cluster, parallel, rows, n) for n in reversed(fitting))
    fits = next((size for size in sizes if size.total <= size.capacity), None)
    return fits if fits is not None else replace(_size(model, cluster, parallel, rows, 1), micro_batch_rows=0)


def _num_parts(cluster: Cluster, parallel: str) -> int:
    """GPUs that share one copy of the weights."""
    group = min(cluster.shard_size or cluster.per_node, cluster.num_gpus)
    return {"ddp": 1, "fsdp2": cluster.num_gpus, "hsdp": group}[parallel]


def _size(model: CountedModel, cluster: Cluster, parallel: str, rows: int, micro: int) -> Size:
    gpu, parts = GPUS[cluster.gpu], _num_parts(cluster, parallel)
    block = (model.weights - model.root_weights) / model.num_blocks
    slots = micro * model.length
    # Two blocks in bf16, the one that is computed and the next, and gradients of one; the vocabulary stays whole.
    num_gathered = model.num_blocks if model.keeps_blocks else 2
    gathered = 0.0 if parts == 1 else 2 * num_gathered * block + 4 * block + (2 + 4) * model.root_weights
    micro_seconds = _micro_seconds(model, cluster, parallel, slots)
    accumulation = rows // (cluster.num_gpus * micro)
    seconds = accumulation * micro_seconds + _step_seconds(model, cluster, parallel, micro_seconds)
    speed = rows * model.length / seconds
    # As a run says it: without what checkpointing computes again.
    flops = (model.block_flops + model.attention_flops) / model.again + model.loss_flops
    peak = (PEAKS[gpu.name].bf16 or 0) * 1e12
    days = None if model.slots is None else model.slots / speed / 86400
    return Size(
        parallel=parallel,
        gpu=cluster.gpu,
        num_gpus=cluster.num_gpus,
        micro_batch_rows=micro,
        accumulation=accumulation,
        # Autocast keeps bf16 copies of all weights through a forward; sharded weights are gathered in bf16.
        weights=4 * model.weights / parts + (2 * model.weights if parts == 1 or model.copies_bf16 else 0),
        gradients=4 * model.weights / parts,
        optimizer=model.optimizer_bytes / parts,
        average=4 * model.weights / parts if model.averages else 0.0,
        gathered=gathered,
        activations=slots * (model.saved_bytes_per_slot + model.again_bytes_per_slot),
        loss=min(_LOGITS, 4 * slots * model.logits_per_slot) * 1.5,
        reserved=_RESERVED * gpu.memory,
        capacity=gpu.memory,
        slots_per_second=speed,
        mfu=speed * flops / cluster.num_gpus / peak,
        days=days,
        gpu_hours=None if days is None else days * 24 * cluster.num_gpus,
    )


def _micro_seconds(model: CountedModel, cluster: Cluster, parallel: str, slots: int) -> float:
    """Forward and backward of a micro-batch, and what is exchanged within."""
    gpu = GPUS[cluster.gpu]
    peak, bandwidth = (PEAKS[gpu.name].bf16 or 0) * 1e12, gpu.bandwidth * _BANDWIDTH
    seconds = slots * (model.block_flops + model.loss_flops) / (peak * _PRODUCTS)
    seconds += slots * model.attention_flops / (peak * _ATTENTION)
    seconds += slots * (model.moved_bytes_per_slot + 2 * _LOGIT_PASSES * model.logits_per_slot) / bandwidth
    seconds = max(seconds, model.launches / 4 * _LAUNCH_SECONDS)  # A compiled step launches about a quarter.
    parts = _num_parts(cluster, parallel)
    if parts > 1:  # Gathered in bf16 for the forward and again for the backward, then reduced in fp32.
        exchanged = (2 + 2 + 4) * model.weights * (parts - 1) / parts / _link(cluster, parts)
        seconds += max(exchanged - _HIDDEN * seconds, (1 - _HIDDEN) * exchanged)
    return seconds


def _step_seconds(model: CountedModel, cluster: Cluster, parallel: str, micro_seconds: float) -> float:
    """Once a step: gradients of copies, and the optimizer."""
    gpu, parts = GPUS[cluster.gpu], _num_parts(cluster, parallel)
    copies, seconds = cluster.num_gpus // parts, 0.0
    if copies > 1:
        link = _link(cluster, cluster.num_gpus)
        exchanged = 2 * 4 * model.weights / parts * (copies - 1) / copies / link
        seconds += max(exchanged - _HIDDEN * micro_seconds * 2 / 3, (1 - _HIDDEN) * exchanged)
    moved = 2 * (model.optimizer_bytes + 8 * model.weights) / parts
    seconds += moved / (gpu.bandwidth * _BANDWIDTH)
    peak = (PEAKS[gpu.name].bf16 or 0) * 1e12
    return seconds + model.optimizer_flops / cluster.num_gpus / (peak * _PRODUCTS)


def _link(cluster: Cluster, parts: int) -> float:
    """Bytes a second that each of so many GPUs exchanges with the others, four fifths of the data sheet."""
    return 0.8 * (GPUS[cluster.gpu].link if parts <= cluster.per_node else cluster.network)
