"""Reading what a run wrote."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

EXACT = ("step", "loss_hex", "grad_norm_hex", "lr", "num_tokens", "num_targets", "batch_digest")


def log_lines(output_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def exact_steps(output_dir: Path, *, after: int = 0) -> list[tuple[Any, ...]]:
    """What must repeat bit for bit, of every step after `after`."""
    return [tuple(x[k] for k in EXACT) for x in log_lines(output_dir, "step") if x["step"] > after]


def assert_same_run(parts: Path, whole: Path, *, step: int, files: Sequence[str] = ("model.safetensors",)) -> None:
    """Equal steps and evaluations, and equal weights in the files of the checkpoint of `step`, bit for bit."""
    assert exact_steps(parts) == exact_steps(whole)
    assert log_lines(parts, "eval") == log_lines(whole, "eval")
    for file in files:
        a, b = (load_file(run / "checkpoints" / str(step) / file) for run in (parts, whole))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
