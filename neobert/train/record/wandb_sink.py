"""Weights & Biases as a tracker. It receives what it may know, and nothing that looks like a secret."""

import math
import os
from pathlib import Path

from torch import nn

from neobert.config.schema import Config
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
