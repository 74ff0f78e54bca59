"""Which precision `trainer.mixed_precision: auto` means on this machine.

On a GPU the answer is in its capabilities: bf16 where it has it. On a CPU it is not: without instructions for it bf16
is several times slower than fp32, with them several times faster, and libraries decide which of them are used. So two
matrix products of the model's shape are timed, one in each precision. bf16 also converts weights and activations back
and forth, so it is taken only when its product is clearly faster.

The choice is part of what makes a run exact: it is one for all ranks, the run's config holds it, and a run that
continues from a checkpoint keeps the checkpoint's.
"""

import time
from dataclasses import replace
from typing import Any

import torch

from neobert.config.schema import Config
from neobert.train.agreement import exchange
from neobert.train.runtime import Runtime, StartupError, choose_device_type

LEAST_GAIN = 1.2
"""How many times faster the bf16 product must be on a CPU."""

_ROWS, _FIRST_ROWS = 2048, 16
"""Of a product; the first ones say how many of them `_SECONDS` pay for."""

_REPEATS = 5
_SECONDS = 0.1
"""Of one product at most. Without instructions for bf16 some CPUs are a hundred times slower in it, and 2,048 rows of a
base-size model take half a minute."""


def bind_precision(config: Config, checkpoint_config: Config | None, runtime: Runtime) -> tuple[Config, list[str]]:
    """The config with a precision in the place of `auto`, and what to say about it; collective.

    Raises:
        StartupError: the checkpoint's precision is bf16, and this GPU does not have it.
    """
    if config.trainer.mixed_precision != "auto":
        return config, []
    if checkpoint_config is None:
        # Every GPU is asked, and one `no` is enough; on a CPU rank 0 measures.
        asked = runtime.is_main or choose_device_type(config) == "cuda"
        answers: list[Any] = exchange(runtime, choose_precision(config) if asked else None)
        precision, reason = max(answer for answer in answers if answer is not None)  # `no` is more than `bf16`.
    else:
        precision, reason = checkpoint_config.trainer.mixed_precision, "the checkpoint's"
        if precision == "bf16" and runtime.device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise StartupError(
                "trainer.mixed_precision: auto keeps the checkpoint's bf16, but this GPU has no bfloat16; "
                "write trainer.mixed_precision: no to go on in float32"
            )
    bound = replace(config, trainer=replace(config.trainer, mixed_precision=precision))
    return bound, [f"trainer.mixed_precision: auto is {precision}: {reason}"]


def choose_precision(config: Config) -> tuple[str, str]:
    """`bf16` or `no`, and the reason, with the numbers that were measured."""
    if choose_device_type(config) == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU has bfloat16") if supported else ("no", "this GPU has no bfloat16")
    inner, outer = config.model.hidden_size, config.model.intermediate_size
    fp32, bf16 = (measure_product(_ROWS, inner, outer, dtype) for dtype in (torch.float32, torch.bfloat16))
    return choose_faster(fp32=fp32, bf16=bf16), (
        f"products of up to {_ROWS} x {inner} x {outer} make {bf16 / 1e9:,.1f} GFLOP/s in bf16 and {fp32 / 1e9:,.1f} "
        f"in fp32 on this CPU (bf16 is taken from {LEAST_GAIN} times as many)"
    )


def choose_faster(*, fp32: float, bf16: float) -> str:
    """The precision for two rates in FLOP/s."""
    return "bf16" if bf16 >= LEAST_GAIN * fp32 else "no"


def measure_product(rows: int, inner: int, outer: int, dtype: torch.dtype) -> float:
    """FLOP/s of `[rows, inner] x [inner, outer]` on the CPU, with fewer rows where so many take too long: the best of a
    few products, after two small ones of which the first finds its code."""
    a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, outer, dtype=dtype)
    first = min(rows, _FIRST_ROWS)
    for _ in range(2):
        seconds = _time_product(a[:first], b)
    rows = min(rows, max(first, int(first * _SECONDS / seconds)))
    best = min(_time_product(a[:rows], b) for _ in range(_REPEATS))
    return 2 * rows * inner * outer / best


def _time_product(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        torch.mm(a, b)
    return time.perf_counter() - start
