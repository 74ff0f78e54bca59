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
from neobert.config.fields import FIELDS, Field
from neobert.config.schema import Config
from neobert.train.agreement import Facts
from neobert.weights.manifest import MANIFEST

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy")
"""Whose versions a checkpoint records."""

READERS = ("datasets", "pyarrow")
"""Packages that read data."""

A_PATH = "(a path)"


def describe_config(config: Config) -> Facts:
    """Every key that decides what is trained or in which order the ranks meet. `wandb` is rank 0's alone, and
    `lock.check_shared` compares the output folder."""
    return {
        key: _without_path(field, field.value_in(config))
        for key, field in FIELDS.items()
        if not field.known.machine and not key.startswith("wandb.")
    }


def _without_path(field: Field, value: Any) -> Any:
    """Of what says where something lies, whether it is given is compared, and not what it says."""
    if field.key == "dataset.mixture":
        return [asdict(replace(source, path=source.path and A_PATH)) for source in value]
    if field.known.path and (field.key != "trainer.resume_from_checkpoint" or "/" in (value or "")):
        return value and A_PATH
    return [asdict(item) for item in value] if field.item is not None else value


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
