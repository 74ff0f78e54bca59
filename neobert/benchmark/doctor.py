"""`neobert doctor`: what this machine has, what is missing and why, and whether a training can start here.

Everything is asked with the functions that a run asks at its start, so the answers are those of a run. The self-test
computes a little: the chosen attention and loss against their definitions, matrix products, and a file that is written
to the disk of the output folder. Nothing is downloaded, and nothing is left on the disk.

A problem keeps a training from starting, or makes it compute wrong results. Advice is for what costs time, or may fail
later. A healthy machine has neither.
"""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from neobert.benchmark.gpu.gpu_kernels import check_machine, distance_to_definition, gradient_distance
from neobert.benchmark.gpu.gpu_table import Bench, Found, NotAsExpected
from neobert.benchmark.hub_access import HubAccess
from neobert.benchmark.settings import StepSettings
from neobert.benchmark.step_time import DTYPES, measure_gemm
from neobert.benchmark.write_speed import find_existing, measure_write
from neobert.config.schema import Config
from neobert.data.tokenizer import Tokenizer, train_tokenizer
from neobert.errors import StartupError, UserError
from neobert.host import affine_cpus, available_cpus
from neobert.inference.teacher import find_teacher
from neobert.kernels.linear_cross_entropy import KERNELS, PACKAGES, choose_kernel, kernel_problem
from neobert.model.attention import ATTENTION, AttentionBackend
from neobert.model.fp8 import fp8_problem
from neobert.objectives.base import ObjectiveModule
from neobert.objectives.table import choose_objective
from neobert.train.build import build_attention, build_encoder, build_model_config, choose_rows_per_step
from neobert.train.checkpoint.run_folder import check_output_dir
from neobert.train.checkpoint.save import estimate_bytes
from neobert.train.hardware.compile_check import KNOWN_RIGHT, TOLERANCE
from neobert.train.hardware.device import (
    choose_device_type,
    choose_faster,
    find_device_problems,
    find_tool_problems,
    measure_product,
)
from neobert.train.hardware.machine import (
    Runtime,
    bind_precision,
    build_runtime,
    check_runtime,
    choose_compile,
    compute_dtype,
)
from neobert.train.hardware.memory import available_bytes
from neobert.train.hardware.micro_batch import KEY, bind_micro_batch
from neobert.train.processes.launcher import bind_launcher
from neobert.train.start import check_free_space, choose_start

SECONDS = 10.0
"""Of the self-test at most, where others leave the machine its time: what takes longest starts in the first half."""

SLOW_DISK = 20e6
"""Bytes a second."""

_GEMM = (1024, 1024, 1024)
"""A product on a CPU."""

_EFFICIENCY = 0.3
"""Of a step, against the product: small models have less, so a step is rather overestimated."""


@dataclass(kw_only=True, slots=True)
class Diagnosis(Found):
    """What was seen, and what to do about it."""

    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def can_start(self) -> bool:
        return not self.problems

    @contextmanager
    def noting(self, part: str) -> Iterator[None]:
        """An error of the block becomes a problem: the other parts have their turn."""
        try:
            yield
        except UserError as error:  # Which several parts may meet.
            self.problems += [line for line in str(error).split("\n") if line not in self.problems]
        except Exception as error:  # Of a driver, a kernel, a library: any kind.
            reason = next(iter(str(error).strip().splitlines()), "no message")
            self.problems.append(f"{part}: {type(error).__name__}: {reason}")

    def describe(self, name: str) -> str:
        """All of it as text; `name` is the config that can or cannot start."""
        lines = [*self.lines, *(f"problem: {x}" for x in self.problems), *(f"advice: {x}" for x in self.advice)]
        last = f"a training with {name} can start here"
        return "\n".join([*lines, last if self.can_start else f"{last.replace('can', 'cannot')}: see the problems"])

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        both = {"problems": self.problems, "advice": self.advice, "lines": self.lines}
        return {"can_start": self.can_start, **both, "values": self.values}


def examine(config: Config, *, network: bool = True) -> Diagnosis:
    """Looks at the machine, and computes for at most about SECONDS.

    Args:
        config: of pretraining.
        network: tries to open a connection to the hub, through which nothing is sent.
    """
    seen, hub = Diagnosis(), HubAccess(config, network=network)
    with seen.noting("start"):
        config, _ = bind_launcher(config)
    for check in (check_runtime, check_output_dir, _check_folder):
        with seen.noting("start"):
            check(config)
    device_type = choose_device_type(config)
    is_there = not find_device_problems(config, device_type)
    with seen.noting("machine"):
        _look_at_machine(seen, config, device_type if is_there else "cpu")
    if is_there:
        with seen.noting("self-test"):
            runtime = build_runtime(config)
            try:
                _look_at_choices(seen, config, runtime)
            finally:
                runtime.close()
    else:
        seen.lines.append(f"self-test: not run, there is no {device_type}")
    with seen.noting("hub"):
        line, values, advice = hub.describe()
        seen.add("hub", line, **values)
        seen.advice += advice
    return seen


def _check_folder(config: Config) -> None:
    """What a fresh start would find in its folder; a resume verifies its checkpoint, which takes its time."""
    if config.trainer.resume_from_checkpoint is None:
        choose_start(config)


# ---- the machine ----


def _look_at_machine(seen: Diagnosis, config: Config, device_type: str) -> None:
    seen.add("system", f"{platform.platform()}, {available_cpus()} of {affine_cpus()} CPUs may be kept busy")
    try:
        found: Found = check_machine(Bench(device=device_type, folder=Path()))
    except NotAsExpected as error:
        found = error.found
        if not any(str(error) in problem for problem in seen.problems):
            seen.advice.append(str(error))
    seen.lines += found.lines
    seen.values |= found.values
    if device_type == "cpu":
        missing = find_tool_problems(config, "cpu", inductor=True, kernel=None)
        seen.add("C++ compiler", "there is none" if missing else "is on the PATH", found=not missing)
        seen.advice += [x for x in missing if x not in seen.problems]


# ---- what `auto` chooses ----


def _look_at_choices(seen: Diagnosis, config: Config, runtime: Runtime) -> None:
    """What the run would compute with, in the order in which a run decides it, each with its test."""
    started = time.monotonic()
    bound, notes = bind_precision(config, None, runtime)
    seen.lines += notes or [f"trainer.mixed_precision: {bound.trainer.mixed_precision}"]
    runtime = runtime.with_precision(bound.trainer.mixed_precision)
    bench, dtype = Bench(device=runtime.device.type, folder=Path()), compute_dtype(bound)
    choices: dict[str, Any] = {"mixed_precision": bound.trainer.mixed_precision, "compile": choose_compile(bound)}
    seen.values["choices"] = choices
    rates = _measure_rates(seen, runtime)
    if bound.trainer.mixed_precision == "bf16" and bench.dry and choose_faster(**rates) == "no":
        seen.advice.append(
            "trainer.mixed_precision: bf16 is no faster than fp32 on this CPU, and rounds more; write auto, or no"
        )
    with seen.noting("model.attn_backend"):
        _look_at_attention(seen, bound, bench, dtype)
    with seen.noting("model.kernel_backend"):
        _look_at_kernels(seen, bound, bench, dtype)
    problem = fp8_problem(runtime.device)
    seen.add("trainer.fp8 rowwise", "can run" if problem is None else f"cannot run here, it {problem}")
    written = bound.trainer.torch_compile
    value = "null" if written is None else str(written).lower()
    seen.add("trainer.torch_compile", f"{value}: blocks are {'' if choose_compile(bound) else 'not '}compiled")
    with seen.noting("sizes"):
        rate = rates["fp32" if dtype == torch.float32 else "bf16"]
        _look_at_sizes(seen, bound, runtime, rate, started + SECONDS / 2)
    seconds = time.monotonic() - started
    seen.add("self-test", f"{seconds:.1f} s", seconds=seconds)


def measure_rates(device: torch.device) -> dict[str, float]:
    """FLOP/s of matrix products in fp32 and bf16, of a GPU or of the CPU."""
    if device.type == "cuda":
        return {name: measure_gemm(device, dtype, repeats=3)[0] for name, dtype in DTYPES.items()}
    return {name: measure_product(*_GEMM, dtype) for name, dtype in DTYPES.items()}


def _measure_rates(seen: Diagnosis, runtime: Runtime) -> dict[str, float]:
    """The rates of the device that the run has."""
    on_gpu = runtime.device.type == "cuda"
    rates = measure_rates(runtime.device)
    text = " and ".join(f"{rate / 1e9:,.1f} GFLOP/s in {name}" for name, rate in rates.items())
    seen.add("matrix products", f"{text} on the {'GPU' if on_gpu else 'CPU'}", **rates)
    if not on_gpu:
        _look_at_threads(seen, runtime, rates["fp32"])
    return rates


def _look_at_threads(seen: Diagnosis, runtime: Runtime, rate: float) -> None:
    """How many threads compute, and how many times as fast as one they are; `rate` is theirs in fp32."""
    threads, cpus, gain = torch.get_num_threads(), available_cpus(), 1.0
    if threads > 1:
        torch.set_num_threads(1)
        gain = rate / measure_product(*_GEMM, torch.float32)
        torch.set_num_threads(threads)
    seen.add("threads", f"{runtime.describe_device()}; {gain:.1f} times as fast as one", count=threads, gain=gain)
    if threads > cpus:
        seen.advice.append(
            f"torch computes with {threads} threads, and this process may keep {cpus} CPUs busy: set OMP_NUM_THREADS "
            f"or trainer.cpu_threads to {cpus}"
        )


def _look_at_attention(seen: Diagnosis, config: Config, bench: Bench, dtype: torch.dtype) -> None:
    device = torch.device(bench.device)
    able = []
    for name, backend in ATTENTION.items():
        problem = backend.problem(device, dtype, config.model.head_dim)
        able += [name] if problem is None else []
        seen.add(f"attention {name}", "can run" if problem is None else f"cannot run here, it {problem}")
    chosen: AttentionBackend = build_attention(config)
    seen.add("model.attn_backend", f"{config.model.attn_backend} is {chosen.name} ({chosen.kernel})")
    seen.values["choices"]["attention"] = chosen.name
    others = [f"model.attn_backend: {name}" for name in able if name != chosen.name]
    distance = partial(distance_to_definition, chosen, bench, dtype)
    _compare(seen, f"attention {chosen.name}", distance, TOLERANCE[dtype], others)


def _look_at_kernels(seen: Diagnosis, config: Config, bench: Bench, dtype: torch.dtype) -> None:
    device = torch.device(bench.device)
    for name in dict.fromkeys((*KERNELS, *PACKAGES)):
        if name != "reference":
            problem = kernel_problem(name, device)
            seen.add(f"loss kernel {name}", "can run" if problem is None else f"cannot run here, it {problem}")
    try:
        chosen = choose_kernel(config.model.kernel_backend, device=device)
    except ValueError as error:
        raise StartupError(str(error)) from error
    seen.add("model.kernel_backend", f"{config.model.kernel_backend} is {chosen}")
    seen.values["choices"]["kernel"] = chosen
    others = [] if chosen == "torch" else ["model.kernel_backend: torch"]
    distance = partial(gradient_distance, chosen, bench, low=dtype == torch.bfloat16)
    _compare(seen, f"loss kernel {chosen}", distance, TOLERANCE[dtype], others)


def _compare(seen: Diagnosis, what: str, distance: Any, allowed: float, others: list[str]) -> None:
    """Notes how far something computes from its definition, or that it cannot be called, as problems."""
    remedies = [f"write {other}" for other in others]
    if not torch.__version__.startswith(KNOWN_RIGHT):
        remedies.append(f"install another torch (`pip install 'torch=={KNOWN_RIGHT}.*'`)")
    remedy = ", or ".join(remedies) or "install torch again, and report it if that changes nothing"
    try:
        found = distance()
    except Exception as error:  # Of a kernel or its compiler: any kind.
        reason = next(iter(str(error).strip().splitlines()), "no message")
        seen.problems.append(f"{what} fails ({type(error).__name__}: {reason}); {remedy}")
        return
    seen.add(
        f"{what} against its definition", f"gradients differ by {found:.1e} ({allowed:g} is allowed)", difference=found
    )
    if not found <= allowed:
        seen.problems.append(
            f"{what} computes wrong results here: they differ from the definition by {found:.1e} of their size, and "
            f"{allowed:g} is allowed; {remedy}"
        )


# ---- sizes: memory, disk, micro-batch ----


def _look_at_sizes(seen: Diagnosis, config: Config, runtime: Runtime, flops: float, deadline: float) -> None:
    """What the model of the config needs of memory and disk, where its size is known without opening anything."""
    if config.model.init_from is not None:
        seen.lines.append("memory and disk: not compared, since model.init_from decides the size of the model")
        return
    config, tokenizer = _with_vocabulary(config)
    with torch.device("meta"):
        encoder = build_encoder(config, build_model_config(config, tokenizer), build_attention(config))
        module = choose_objective(config).build_module(encoder, config, KERNELS["torch"])
    parameters = sum(weight.numel() for weight in module.parameters())
    checkpoint = estimate_bytes(module, averaged=config.trainer.ema_decay is not None)
    with seen.noting("memory"):
        _look_at_memory(seen, runtime, parameters, checkpoint)
    with seen.noting("trainer.output_dir"):
        _look_at_disk(seen, config, checkpoint)
    with seen.noting(KEY):
        _look_at_micro_batch(seen, config, runtime, module, tokenizer, flops, deadline)


def _with_vocabulary(config: Config) -> tuple[Config, Tokenizer]:
    """The config with a size of the vocabulary, the usual one where only its tokenizer knows, and a small tokenizer."""
    tokenizer = train_tokenizer(iter(["a text"]), algorithm="byte_bpe", vocab_size=300)
    size = config.model.vocab_size or config.tokenizer.vocab_size or StepSettings().vocab_size
    return replace(config, model=replace(config.model, vocab_size=max(size, tokenizer.size))), tokenizer


def _look_at_memory(seen: Diagnosis, runtime: Runtime, parameters: int, checkpoint: int) -> None:
    on_gpu = runtime.device.type == "cuda"
    free = torch.cuda.mem_get_info(runtime.device)[0] if on_gpu else available_bytes()
    need = checkpoint + 4 * parameters  # The gradients are in no checkpoint.
    text = (
        f"{free / 2**30:.1f} GiB are free; {parameters:,} parameters with gradients and optimizer take about "
        f"{need / 2**30:.2f}"
    )
    seen.add("memory", text, free=free, need=need, parameters=parameters)
    if need > free:
        seen.advice.append(f"memory: {text}: choose a smaller model, or another machine")


def _look_at_disk(seen: Diagnosis, config: Config, checkpoint: int) -> None:
    output_dir = Path(config.trainer.output_dir)
    folder = find_existing(output_dir)
    try:
        speed, free = measure_write(folder)
    except OSError as error:
        seen.problems.append(
            f"trainer.output_dir: {folder} cannot be written ({error}); correct its permissions, make room, or choose "
            "another"
        )
        return
    text = (
        f"{free / 1e9:,.1f} GB free in {folder}, written at {speed / 1e6:,.0f} MB/s; a checkpoint has about "
        f"{checkpoint / 1e6:,.1f} MB"
    )
    seen.add("disk", text, free=free, bytes_per_second=speed, checkpoint_bytes=checkpoint)
    if config.trainer.save_model:
        check_free_space(folder, checkpoint)
    if speed < SLOW_DISK:
        seen.advice.append(
            f"trainer.output_dir: the disk of {folder} writes {speed / 1e6:.1f} MB/s, so that a save takes about "
            f"{checkpoint / speed:.0f} s: choose another disk, or trainer.async_save: true"
        )


def _look_at_micro_batch(
    seen: Diagnosis,
    config: Config,
    runtime: Runtime,
    module: ObjectiveModule,
    tokenizer: Tokenizer,
    flops: float,
    deadline: float,
) -> None:
    rows = config.trainer.per_device_train_batch_size
    if rows != "auto":
        seen.add(KEY, f"{rows}")
        return
    if runtime.device.type != "cpu":
        seen.add(KEY, "auto: the start of a run tries numbers of rows, which takes minutes where blocks are compiled")
        return
    if find_teacher(config) is not None:
        seen.add(KEY, "auto: the start of a run measures it, with the teacher in memory")
        return
    # One row twice and two rows once, two steps of each; a step costs 6 operations for a weight and token.
    tokens = 8 * config.dataset.max_seq_length
    seconds = 6 * sum(weight.numel() for weight in module.parameters()) * tokens / (_EFFICIENCY * flops)
    if time.monotonic() + seconds > deadline:
        seen.add(
            KEY, f"auto: the start of a run measures it; here that takes about {seconds:.0f} s, too long for a test"
        )
        return
    bound, notes = bind_micro_batch(
        config,
        runtime,
        rows_per_step=choose_rows_per_step(config, runtime.world),
        kept=None,
        model_config=module.encoder.config,
        attention=build_attention(config),
        tokenizer=tokenizer,
    )
    seen.lines += notes
    seen.values["choices"]["per_device_train_batch_size"] = bound.trainer.per_device_train_batch_size
