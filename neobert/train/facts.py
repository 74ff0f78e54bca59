"""What has to be equal on all ranks of a run: settings, code and packages, and the checkpoint that it resumes from.

Paths, threads and trackers are a machine's own: what is found under a path is compared instead (the fingerprint of the
data, the digest of the tokenizer, the initial weights).
"""

import hashlib
import platform
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import neobert
from neobert.config.fields import FIELDS
from neobert.config.schema import Config
from neobert.train.agreement import Facts
from neobert.weights.manifest import MANIFEST

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy")
"""Whose versions a checkpoint records."""

READERS = ("datasets", "pyarrow")
"""Packages that read data."""

PATHS = frozenset(
    (
        "dataset.path",
        "dataset.pre_tokenize_output",
        "tokenizer.path",
        "model.init_from",
        "contrastive.pretrained_checkpoint_dir",
    )
)
"""Keys that say where something lies: whether they are given is compared, and not what they say."""

MACHINE = frozenset(
    (
        "trainer.output_dir",
        "dataset.cache_dir",
        "dataset.num_workers",
        "dataset.num_proc",
        "dataset.prefetch_factor",
        "dataset.pin_memory",
        "dataset.network_retries",
        "trainer.disable_tqdm",
    )
)
"""Keys that follow the machine; `wandb` is rank 0's alone, and `lock.check_shared` compares the output folder."""

A_PATH = "(a path)"


def describe_config(config: Config) -> Facts:
    """Every key that decides what is trained or in which order the ranks meet."""
    return {
        key: _without_path(key, field.value_in(config))
        for key, field in FIELDS.items()
        if key not in MACHINE and not key.startswith("wandb.")
    }


def _without_path(key: str, value: Any) -> Any:
    if key == "dataset.mixture":
        return [asdict(replace(source, path=source.path and A_PATH)) for source in value]
    if key in PATHS or (key == "trainer.resume_from_checkpoint" and "/" in (value or "")):
        return value and A_PATH
    return [asdict(item) for item in value] if key in ("contrastive.sets", "contrastive.eval_sets") else value


def describe_program() -> Facts:
    """The source code of this package by file, and the versions of Python and of the packages that compute and read."""
    folder = Path(neobert.__file__).parent
    code = {
        f"code of neobert/{path.relative_to(folder).as_posix()}": _digest(path) for path in sorted(folder.rglob("*.py"))
    }
    versions = {f"version of {name}": version(name) for name in (*PACKAGES, *READERS)}
    return code | {"version of Python": platform.python_version()} | versions


def describe_checkpoint(checkpoint: Path | None) -> Facts:
    """The checkpoint that is resumed from, as this rank sees it; nothing but its name where there is none."""
    if checkpoint is None:
        return {"checkpoint": None}
    files = (MANIFEST, "train_state.json", "config.yaml", "model_config.json")
    contents = {f"{name} of the checkpoint": _digest(checkpoint / name) for name in files}
    return {"checkpoint": checkpoint.name} | contents


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None
