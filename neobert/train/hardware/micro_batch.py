"""How many rows fit in memory: `trainer.per_device_train_batch_size: auto`.

The rows of a step are `trainer.global_batch_size`, whatever the machine: only the part that goes through the model at
once is chosen, among the numbers that divide the rows of one process. Full rows of random tokens, one document each
(the most expensive kind for attention), make a whole step on a model and an optimizer that are thrown away afterwards.

- On a GPU, ascending numbers are tried until one runs out of memory or passes `GPU_FRACTION` of what was free; compiled
  where the run is, since compiled steps need less.
- On a CPU nothing may run out of memory, since the system would end the process: the peak of the two smallest numbers
  is measured, a straight line through them gives the others, and the largest below `CPU_FRACTION` of what is available
  is used, up to `MOST_CPU_SLOTS` slots, which keep the cores of a CPU busy.

With several processes all use the smallest number. The number is part of what makes a run exact (sums are added
in the order of the micro-batches), so the run's config holds it and a run that continues keeps it, as long as its rows,
their length and the number of processes stay.
"""

import gc
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch._dynamo  # Optimizers import it when the first is made: its memory is not that of a step.

from neobert.config.schema import Config
from neobert.data.rows.collate import Collator
from neobert.data.rows.packing import max_segments_per_row
from neobert.data.tokenizer import Tokenizer
from neobert.errors import StartupError
from neobert.model.attention import AttentionBackend
from neobert.model.config import ModelConfig
from neobert.objectives.base import Teacher
from neobert.objectives.causal_lm import build_next_tokens
from neobert.objectives.table import choose_objective
from neobert.train.build import build_mask_policy, build_model, build_module, build_run_optimizer, computing_module
from neobert.train.hardware.machine import Runtime, compute_dtype
from neobert.train.hardware.memory import available_bytes, current_bytes, forget_peak, is_out_of_memory, peak_bytes
from neobert.train.processes.agreement import exchange
from neobert.train.step import train_step
from neobert.types import PackedBatch, PackedRow

KEY = "trainer.per_device_train_batch_size"

GPU_FRACTION = 0.9
"""The rest is for fragments, for buckets of reduced gradients and for what compiled code allocates."""

CPU_FRACTION = 0.7
"""The rest is for reading, evaluating and saving, and for other programs."""

MOST_CPU_SLOTS = 8192
"""Of a micro-batch on a CPU."""

Measure = Callable[[int], int | None]
"""Rows -> bytes at the peak of a step of so many rows; None when there was not enough memory."""


def bind_micro_batch(
    config: Config,
    runtime: Runtime,
    *,
    rows_per_step: int,
    kept: int | None,
    model_config: ModelConfig,
    attention: AttentionBackend,
    tokenizer: Tokenizer,
    teacher: Teacher | None = None,
) -> tuple[Config, list[str]]:
    """The config with a number instead of `auto`, and what to say about it; collective.

    Args:
        rows_per_step: global batch, a multiple of the number of processes.
        kept: the number of the checkpoint, see `choose_kept`.

    Raises:
        StartupError: not even one row fits, or the system does not report its memory.
    """
    if config.trainer.per_device_train_batch_size != "auto":
        return config, []
    if kept is None:
        candidates = divisors(shared_rows(config, rows_per_step) // runtime.world)
        measure = build_measure(config, runtime, model_config, attention, tokenizer, teacher)
        try:
            if runtime.device.type == "cuda":
                found = choose_by_trial(candidates, measure, gpu_limit(runtime.device))
            else:
                most = max(1, MOST_CPU_SLOTS // config.dataset.max_seq_length)
                found = choose_by_line([n for n in candidates if n <= most], measure, cpu_limit())
        except OSError as error:
            raise StartupError(
                f"{KEY}: auto cannot measure the memory of this system ({error}); write a number"
            ) from error
        rows, reason = min(exchange(runtime, found))
        if not rows:
            raise StartupError(
                f"{KEY}: auto: not even one row of {config.dataset.max_seq_length} slots fits ({reason}); set "
                "trainer.gradient_checkpointing: true, or a smaller dataset.max_seq_length or model"
            )
    else:
        rows, reason = kept, "the checkpoint's"
    bound = replace(config, trainer=replace(config.trainer, per_device_train_batch_size=rows))
    return bound, [f"{KEY}: auto is {rows}: {reason}"]


def choose_kept(
    config: Config, checkpoint_config: Config | None, saved: dict[str, Any] | None, *, rows_per_step: int, world: int
) -> int | None:
    """The checkpoint's micro-batch where a run continues as it was; None where the memory has to be measured again."""
    if checkpoint_config is None or saved is None:
        return None
    same_rows = saved["rows_per_step"] == rows_per_step and saved["world_size"] == world
    same_length = checkpoint_config.dataset.max_seq_length == config.dataset.max_seq_length
    same_start = checkpoint_config.trainer.batch_size_warmup_start == config.trainer.batch_size_warmup_start
    return checkpoint_config.trainer.micro_batch_rows if same_rows and same_length and same_start else None


def shared_rows(config: Config, rows_per_step: int) -> int:
    """What the rows of every step are a multiple of, also while the batch warms up."""
    return math.gcd(rows_per_step, config.trainer.batch_size_warmup_start or rows_per_step)


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def choose_by_trial(candidates: Sequence[int], measure: Measure, limit: int) -> tuple[int, str]:
    """The last of the ascending `candidates` whose peak is within `limit` bytes (0: none is), and the reason."""
    chosen, reason = 0, "none was tried"
    for rows in candidates:
        peak = measure(rows)
        if peak is None or peak > limit:
            needed = "more than there is" if peak is None else f"{peak / 2**30:.2f} GiB"
            return chosen, f"{reason}; {rows} rows need {needed}"
        chosen, reason = rows, f"a peak of {peak / 2**30:.2f} of {limit / 2**30:.2f} GiB"
    return chosen, reason


def choose_by_line(candidates: Sequence[int], measure: Measure, limit: int) -> tuple[int, str]:
    """The largest of the ascending `candidates` whose peak should be within `limit` bytes (0: none), and the reason.

    Only the first two are measured, the second only when the first leaves room for it; the others are read off the
    straight line through both. The first is measured twice: in the first step of a process libraries take memory and
    keep it, which is needed but does not grow with the rows.
    """
    first = candidates[0]
    peak = measure(first)
    if peak is None or peak > limit:
        needed = "more than there is" if peak is None else f"{peak / 2**30:.2f} of {limit / 2**30:.2f} GiB"
        return 0, f"{first} rows need {needed}"
    reason = f"{first} rows need {peak / 2**30:.2f} of {limit / 2**30:.2f} GiB"
    # A step never needs more than in proportion to its rows, since a part of it is the model.
    if len(candidates) == 1 or peak * candidates[1] / first > limit:
        return first, reason
    second = candidates[1]
    again, second_peak = measure(first), measure(second)
    if again is None or second_peak is None or second_peak > limit:
        return first, reason
    per_row = max(0.0, (second_peak - again) / (second - first))
    second_peak = max(peak, second_peak)
    needs = {rows: second_peak + per_row * (rows - second) for rows in candidates[1:]}
    chosen = max(rows for rows, bytes_ in needs.items() if bytes_ <= limit)
    return chosen, (
        f"{first} and {second} rows need {peak / 2**30:.2f} and {second_peak / 2**30:.2f} GiB, so {chosen} need about "
        f"{needs[chosen] / 2**30:.2f} of {limit / 2**30:.2f} GiB"
    )


def gpu_limit(device: torch.device) -> int:
    """Bytes that a step may take on a GPU."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(GPU_FRACTION * (free + torch.cuda.memory_reserved(device)))


def cpu_limit() -> int:
    """Bytes that a step of this process may take on a CPU.

    Raises:
        OSError: the system does not report it.
    """
    return int(CPU_FRACTION * available_bytes()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def build_measure(
    config: Config,
    runtime: Runtime,
    model_config: ModelConfig,
    attention: AttentionBackend,
    tokenizer: Tokenizer,
    teacher: Teacher | None = None,
) -> Measure:
    """The peak of a training step with this config, as a function of its rows."""
    on_gpu, dtype = runtime.device.type == "cuda", compute_dtype(config)
    # A compiler keeps memory of the process, which on a CPU would be measured too; a step needs less with it.
    measured = config if on_gpu else replace(config, trainer=replace(config.trainer, torch_compile=False))

    def make_step(rows: int) -> None:
        module = build_module(measured, model_config, attention, runtime, teacher)
        model = build_model(measured, module)
        computing_module(model).learn_from_average(lambda: dict(module.named_parameters()))
        autocast = dtype != torch.float32 and not config.trainer.bf16_residual
        model.forward = torch.autocast(runtime.device.type, dtype=dtype, enabled=autocast)(model.forward)  # type: ignore[method-assign]
        batch = build_full_rows(config, tokenizer, rows).to(runtime.device)
        optimizer = build_run_optimizer(config, module)
        clipping = config.trainer.gradient_clipping
        for _ in range(2):  # The second has the optimizer's state from the start.
            train_step(model, optimizer, [batch], lr=0.0, scale=1.0, gradient_clipping=clipping)

    def measure_gpu(rows: int) -> int | None:
        torch.cuda.reset_peak_memory_stats(runtime.device)
        fits = _survives(make_step, rows)
        peak = torch.cuda.max_memory_reserved(runtime.device)
        torch.compiler.reset()  # Each number of rows has graphs of its own, and compilers give up after some.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(runtime.device)
        return peak if fits else None

    def measure_cpu(rows: int) -> int | None:
        gc.collect()
        forget_peak()
        before = current_bytes()
        fits = _survives(make_step, rows)
        gc.collect()
        return peak_bytes() - before if fits else None

    return measure_gpu if on_gpu else measure_cpu


def _survives(make_step: Callable[[int], None], rows: int) -> bool:
    """Whether a step of so many rows has enough memory; its tensors are gone when this returns."""
    try:
        make_step(rows)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def build_full_rows(config: Config, tokenizer: Tokenizer, rows: int) -> PackedBatch:
    """Rows without padding, each a single document of random tokens."""
    length, packed = config.dataset.max_seq_length, config.datacollator.pack_sequences
    section = config.datacollator
    rate = section.mlm_probability if section.mlm_rate == "fixed" else section.mlm_rate_range[1]
    masks = build_mask_policy(tokenizer, rate, mask_all=section.mask_all)
    corrupt = choose_objective(config).corrupt if section.clm_steps is None else build_next_tokens
    collate = Collator(
        policy=corrupt(masks),
        seed=0,
        draw="row",
        max_seq_length=length,
        max_segments=max_segments_per_row(length, packed=packed),
        pad_id=tokenizer.pad_id,
    )
    tokens = np.random.default_rng(0).choice(tokenizer.random_ids, (rows, length)).astype(np.int32)
    tokens[:, 0], tokens[:, -1] = tokenizer.cls_id, tokenizer.sep_id
    return collate(
        [
            PackedRow(tokens=row, lengths=(length,), documents=(0,), offsets=(0,), sources=(0,), key=number)
            for number, row in enumerate(tokens)
        ]
    )
