"""Compiled blocks must have the gradients of eager ones: a small block shows it before a run trains.

A compiler that computes wrong gradients does not say so, and the loss falls all the same: torch 2.11 did it to
functions that returned what they had changed in place. So with `trainer.torch_compile` an encoder of the run's kind,
but tiny, goes forward and backward eagerly and compiled, in the run's precision, with its attention and the options of
its compiler.

That takes seconds. A pass is kept in the user's cache folder, one file for what it depends on: machine, versions, code
of the blocks, settings. A failure is not kept. Where nothing can be written, each start checks again.
"""

import hashlib
import inspect
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from neobert.config.schema import Config
from neobert.disk import cache_folder
from neobert.errors import StartupError
from neobert.model.attention import AttentionBackend
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.fp8 import FP8_PRODUCTS, use_fp8
from neobert.model.segments import Segments
from neobert.objectives.table import choose_objective
from neobert.train.build import choose_compile_options, compile_blocks
from neobert.train.hardware.machine import Runtime, choose_compile, compute_dtype
from neobert.train.master_weights import bf16_parts
from neobert.train.processes.agreement import exchange

KNOWN_RIGHT = "2.13"
"""A release of torch in which all tests of compiled gradients pass."""

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 5e-2}
"""Largest difference of a gradient from the eager one, as a part of its norm. Other sums of the same products differ by
about 1e-6 and 5e-3."""

_SHAPES_THE_GRAPH = (
    "rope",
    "rms_norm",
    "hidden_act",
    "norm_eps",
    "qk_norm",
    "embedding_norm",
    "first_attention_norm",
    "ngpt",
)
"""Settings of the model that choose what a block computes, beside its windows."""

_VERSIONS = ("torch", "triton", "neobert")


def check_compiled_gradients(config: Config, attention: AttentionBackend, runtime: Runtime) -> list[str]:
    """What to say about the check, nothing where none was due; collective.

    Raises:
        StartupError: on every rank, when on any of them compiled gradients differ or a block cannot be compiled.
    """
    if not choose_compile(config):
        return []
    outcomes = exchange(runtime, _check(config, attention, runtime.device))
    for rank, (problem, _) in enumerate(outcomes):
        if problem is not None:
            where = f" (seen by process {rank} of {runtime.world})" if runtime.world > 1 else ""
            value = "true" if config.trainer.torch_compile else "null, which is true on a GPU"
            raise StartupError(f"trainer.torch_compile: {value}, but {problem}{where}")
    return [note for _, note in outcomes[:1] if note is not None]


def _check(config: Config, attention: AttentionBackend, device: torch.device) -> tuple[str | None, str | None]:
    """What is wrong, and what to say where nothing is."""
    facts = _facts(config, attention, device)
    record = _record_of(facts)
    if record is not None and os.path.isfile(record):  # Unlike Path.is_file, no error in a folder without access.
        return None, None
    start = time.perf_counter()
    backend, advice = config.trainer.torch_compile_backend, f"{_versions()}; {_remedy()}"
    try:
        name, difference = find_largest_difference(config, attention, device)
    except Exception as error:  # Of the compiler or of what it calls: any kind. Other ranks wait for an answer.
        reason = next(iter(str(error).strip().splitlines()), "no message")
        return f"a small block cannot be compiled by {backend}: {type(error).__name__}: {reason}. {advice}", None
    tolerance = TOLERANCE[compute_dtype(config)]
    if not difference <= tolerance:
        return (
            f"compiled by {backend} a small block computes wrong gradients here: {name} differs from the eager one by "
            f"{difference:.2g} of its size, {tolerance:g} is allowed. {advice}"
        ), None
    _keep(record, facts)
    seconds = time.perf_counter() - start
    return None, (
        f"trainer.torch_compile: compiled gradients of a small block are the eager ones (largest difference "
        f"{difference:.1g} of their size; {seconds:.1f} s, once per machine, version and kind of block)"
    )


def _versions() -> str:
    """This torch and one that is known to be right."""
    return (
        f"This is torch {torch.__version__} with Python {platform.python_version()}; "
        f"torch {KNOWN_RIGHT} is known to be right"
    )


def _remedy() -> str:
    another = f", or install another torch (`pip install 'torch=={KNOWN_RIGHT}.*'`)"
    return "write trainer.torch_compile: false" + ("" if torch.__version__.startswith(KNOWN_RIGHT) else another)


def find_largest_difference(config: Config, attention: AttentionBackend, device: torch.device) -> tuple[str, float]:
    """Of a small encoder's hidden states and gradients, compiled against eager: the name of the one that differs most,
    and by which part of its norm. Forgets what this process had compiled."""
    torch.manual_seed(0)
    encoder = Encoder(small_model(config), attention).to(device)
    for weight in encoder.parameters():
        if weight.ndim == 1:  # All ones would hide a gain that is not used.
            weight.detach().mul_(torch.empty_like(weight).uniform_(0.5, 1.5))
    if config.trainer.fp8 != "no":
        use_fp8(encoder, FP8_PRODUCTS[config.trainer.fp8])
    dtype = compute_dtype(config)
    if config.trainer.bf16_residual:  # Then there is no autocast.
        for part in bf16_parts(encoder):
            part.to(dtype)
        dtype = torch.float32
    causal = _is_causal(config)
    eager = _hidden_and_gradients(encoder, device, dtype, causal=causal)
    compile_blocks(config, encoder)
    try:
        compiled = _hidden_and_gradients(encoder, device, dtype, causal=causal)
    finally:
        torch.compiler.reset()  # Compilers give up after a number of graphs: these do not count.
    differences = {
        name: ((compiled[name] - expected).norm() / expected.norm().clamp(min=1e-12)).item()
        for name, expected in eager.items()
    }
    return max(differences.items(), key=lambda item: float("inf") if item[1] != item[1] else item[1])


def _is_causal(config: Config) -> bool:
    """Whether the attention of some steps is causal: it differs by a mask alone, so one kind of steps is checked."""
    return choose_objective(config).is_causal or config.datacollator.clm_steps is not None


def small_model(config: Config) -> ModelConfig:
    """An architecture whose blocks compute what those of the run do: two heads of 32, one layer of each kind."""
    section = config.model
    kind: dict[str, Any] = {name: getattr(section, name) for name in _SHAPES_THE_GRAPH}
    if not section.ngpt:
        kind |= {"embedding_init_range": 0.5, "decoder_init_range": 0.3}
    return ModelConfig(
        hidden_size=64,
        num_hidden_layers=1 + (section.local_attention is not None) + (not section.first_attention_norm),
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=32,
        vocab_size=64,
        pad_token_id=0,
        local_attention=None if section.local_attention is None else 8,
        global_attention_every=2,
        **kind,
    )


def _hidden_and_gradients(
    encoder: Encoder, device: torch.device, dtype: torch.dtype, *, causal: bool
) -> dict[str, Tensor]:
    """Hidden states of three documents in two rows, and all gradients of their product with a fixed matrix."""
    row, slot = torch.arange(64).view(2, 32).div(32, rounding_mode="floor"), torch.arange(64).view(2, 32) % 32
    second = (row == 0) & (slot >= 20)
    borders = torch.tensor([0, 20, 32, 64], dtype=torch.int32)
    segments = Segments(ids=(1 + second.int()), cu_seqlens=borders, cu_seqlens_cpu=borders, max_seqlen=32)
    segments = replace(segments, causal=causal).to(device)
    positions = torch.where(second, slot - 20, slot).int().to(device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 64, (2, 32), generator=generator, dtype=torch.int32).to(device)
    target = torch.randn(64, 64, generator=generator).to(device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        hidden = encoder(tokens, positions, segments)
    names, weights = zip(*encoder.named_parameters())
    gradients = torch.autograd.grad((hidden * target).sum(), weights)
    found = {"the hidden state": hidden.detach(), **{f"the gradient of {n}": g for n, g in zip(names, gradients)}}
    return {name: tensor.float() for name, tensor in found.items()}


# --- what a pass depends on, and where it is kept -------------------------------------------------------------------


def _facts(config: Config, attention: AttentionBackend, device: torch.device) -> dict[str, Any]:
    trainer = config.trainer
    return {
        "machine": [platform.node(), platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "versions": {name: _version_of(name) for name in _VERSIONS},
        "code": _digest_of_code(),
        "model": asdict(small_model(config)),
        "attention": [attention.name, attention.kernel],
        "causal": _is_causal(config),
        "dtype": str(compute_dtype(config)),
        "residual": trainer.bf16_residual,
        "fp8": trainer.fp8,
        "compiler": [trainer.torch_compile_backend, trainer.torch_compile_dynamic, choose_compile_options(config)],
    }


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _digest_of_code() -> str:
    """Of model and kernels: the files, and the functions as they are in this process, where one may be replaced."""
    digest = hashlib.sha256()
    for name, module in sorted(sys.modules.items()):
        if name.startswith(("neobert.model.", "neobert.kernels.")):
            digest.update(Path(str(module.__file__)).read_bytes())
            for holder in (module, *(value for value in vars(module).values() if inspect.isclass(value))):
                for code in _code_of(holder):
                    digest.update(code.co_code + repr(code.co_names).encode())
    return digest.hexdigest()


def _code_of(holder: Any) -> Iterator[CodeType]:
    """Code of the functions of a module or a class, under their decorators."""
    for value in vars(holder).values():
        function = inspect.unwrap(value.__func__ if isinstance(value, staticmethod) else value)
        if inspect.isfunction(function):
            yield function.__code__


def _record_of(facts: dict[str, Any]) -> Path | None:
    """The file that says that a block passed; None where the user has no cache folder."""
    folder = cache_folder("compiled-gradients")
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return None if folder is None else folder / f"{key[:32]}.json"


def _keep(record: Path | None, facts: dict[str, Any]) -> None:
    """Writes down a pass; a cache folder that cannot be written costs the next start a check, and nothing else."""
    if record is None:
        return
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(facts, indent=1) + "\n")
    except OSError:
        return
