"""Where the lines of a log go: `log.jsonl`, which survives kills and full disks, and Weights & Biases."""

import json
import math
import os
from pathlib import Path
from typing import Any

from torch import nn

from neobert.config.nesting import parse_json
from neobert.config.schema import Config
from neobert.disk import write_text
from neobert.secrets import scrub_config

TRACKED_SECTIONS = (
    "task",
    "seed",
    "model",
    "dataset",
    "tokenizer",
    "datacollator",
    "optimizer",
    "scheduler",
    "trainer",
    "contrastive",
    "finetune",
    "glue",
)
"""What a tracker may know of a config; a section that is not listed is not sent."""


class WandbSink:
    """Weights & Biases; `wandb.mode: offline` needs no account and no network."""

    name = "wandb"

    def __init__(self, config: Config, output_dir: Path, module: nn.Module) -> None:
        import wandb

        # Without it wandb uploads the diff of the repository and the command line.
        os.environ.setdefault("WANDB_DISABLE_CODE", "true")
        section = config.wandb
        id_file = output_dir / "wandb_id.txt"
        # A continued run keeps its id, so that `wandb.resume: allow` draws one curve.
        run_id = id_file.read_text().strip() if section.resume != "never" and id_file.is_file() else None
        Path(section.dir).mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=section.project,
            entity=section.entity,
            name=section.name or config.model.name or output_dir.name,
            tags=list(section.tags) or None,
            mode=section.mode,
            dir=section.dir,
            id=run_id,
            resume=section.resume,
            config={name: value for name, value in scrub_config(config).items() if name in TRACKED_SECTIONS},
        )
        id_file.write_text(self._run.id + "\n")
        if section.watch != "off":
            self._run.watch(module, log=section.watch, log_freq=config.trainer.logging_steps)

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log({k: v for k, v in values.items() if math.isfinite(v)}, step=step)

    def close(self) -> None:
        self._run.finish()


class LineFile:
    """An append-only file of one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten: list[str] = []

    def read(self) -> list[dict[str, Any]]:
        """All lines; one torn by a kill is left out."""
        if not self._path.is_file():
            return []
        lines = []
        for text in self._path.read_text(errors="replace").splitlines():
            try:
                line = parse_json(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
        return lines

    def rewrite(self, lines: list[dict[str, Any]]) -> None:
        """Replaces the file: after a kill at any instant it holds the old lines or these."""
        if not self._path.is_file():
            return
        write_text(self._path, "".join(map(_encode, lines)))

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Adds lines and flushes them to the disk; a reader never sees half of one after a clean exit.

        Raises:
            OSError: they could not be written; the next call writes them too.
        """
        self._unwritten += map(_encode, lines)
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a") as handle:
                handle.writelines(self._unwritten)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError:
            if self._path.exists():
                os.truncate(self._path, size)  # Half a line would spoil the line after it.
            raise
        self._unwritten.clear()


def _encode(line: dict[str, Any]) -> str:
    """A number that is not finite becomes null: JSON cannot write it."""
    numbers = {k: None for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps(line | numbers, allow_nan=False) + "\n"
