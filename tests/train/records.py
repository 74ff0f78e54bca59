"""Reading what a run wrote."""

import json
from pathlib import Path
from typing import Any

EXACT = ("step", "loss_hex", "grad_norm_hex", "lr", "num_tokens", "num_targets", "batch_digest")


def log_lines(output_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def exact_steps(output_dir: Path, *, after: int = 0) -> list[tuple[Any, ...]]:
    """What must repeat bit for bit, of every step after `after`."""
    return [tuple(x[k] for k in EXACT) for x in log_lines(output_dir, "step") if x["step"] > after]
