"""One run of an experiment: train a config, then score its weights on held-out documents.

The held-out loss is always the same question: the first 512 tokens of the first 400 documents of the validation split,
15% of their tokens predicted, each replaced by [MASK], chosen by a hash of document and position. It depends on nothing
that the training masks, packs or batches.

Seconds of training are those that the run's log counts, without start-up, evaluation and saving. The first logging
interval is left out too, because a model is compiled and the data opened in it: the others are scaled up to all steps.

The yardstick is how much a config learns in a fixed time. A learning-rate schedule needs the number of steps before the
first one, so a throw-away run of the same config makes some steps first; its speed times the seconds gives the number,
and the run itself makes exactly that many. The seconds that it took are reported beside the budget: they differ where
the machine was slower or faster than in the throw-away run.
"""

import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neobert.config.load import load_config, load_saved_config
from neobert.config.schema import Config
from neobert.data.tokenizer import limit_threads
from neobert.errors import DataError, UserError
from neobert.inference.mlm_loss import LossSettings, MlmLoss, mlm_loss
from neobert.inference.model import load
from neobert.inference.scorer import OwnScorer
from neobert.inference.texts import open_texts
from neobert.train.hardware.device import choose_precision
from neobert.train.loop import pretrain

HELD_OUT = LossSettings(mlm_probability=0.15, mask_all=True, max_length=512, truncate=True, max_documents=400)
"""What is asked of every model."""

VALIDATION = "validation"

FINISHED = ("finished", "complete")


class Stopped(UserError):
    """A run ended before its budget was spent; `outcome` is the reason, a key of EXIT_CODES."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the run stopped early ({reason}); type the same command again")
        self.outcome = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """What a run's log says of its time."""

    num_steps: int
    num_tokens: int
    """Real tokens, without padding."""

    training_seconds: float
    tokens_per_second: float

    @property
    def steps_per_second(self) -> float:
        return self.num_steps / self.training_seconds


def use_threads(count: int) -> None:
    """Threads of torch and of the tokenizer, in this process."""
    torch.set_num_threads(count)
    limit_threads(count)


def fix_precision(config: Config, made: Sequence[Path] = ()) -> list[str]:
    """The override that fixes one precision instead of `auto` for all runs that are compared: that of a config that
    was `made` before, else what is faster here. Two runs that choose for themselves may choose differently."""
    if config.trainer.mixed_precision != "auto":
        return []
    precision = load_saved_config(made[0]).trainer.mixed_precision if made else choose_precision(config)[0]
    return [f"trainer.mixed_precision={precision}"]


def check_data(data: Path) -> None:
    """Raises DataError when `data` is no folder with held-out documents."""
    remedy = f"name one with files called train* and {VALIDATION}*"
    if not data.is_dir():
        raise DataError(f"--data: {data} is no folder; {remedy}")
    try:
        with open_texts(str(data), split=VALIDATION):
            pass
    except DataError as error:
        raise DataError(f"--data: {data}: {error}; {remedy}") from error


def train(config: Config) -> None:
    """`pretrain` to the end of the budget; may be called again in one process. It speaks on the error output.

    Raises:
        Stopped: the run ended before.
    """
    torch.compiler.reset()  # Graphs of earlier models count, and beyond a limit torch compiles no more.
    with contextlib.redirect_stdout(sys.stderr):
        result = pretrain(config)
    if result.reason not in FINISHED:
        raise Stopped(result.reason)


def score(run: Path, data: Path, *, device: str = "auto") -> MlmLoss:
    """The held-out loss of a run's newest checkpoint, in fp32."""
    with open_texts(str(data), split=VALIDATION) as texts:
        return mlm_loss(OwnScorer(load(run, device=device, dtype="fp32")), texts, HELD_OUT)


def read_speed(run: Path) -> Speed:
    """Steps, tokens and seconds of training, from `log.jsonl`; zeros for a run that stopped before it logged."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    intervals: list[dict[str, Any]] = [line for line in lines if line["kind"] == "log"]
    if not intervals:
        return Speed(num_steps=0, num_tokens=0, training_seconds=0.0, tokens_per_second=0.0)
    first, last = intervals[0], intervals[-1]
    seconds: float = sum(line["seconds"] for line in intervals)
    if len(intervals) > 1:
        seconds = (seconds - first["seconds"]) * last["step"] / (last["step"] - first["step"])
    return Speed(
        num_steps=last["step"],
        num_tokens=last["tokens"],
        training_seconds=seconds,
        tokens_per_second=last["tokens"] / seconds,
    )


def describe_machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def measure_steps(file: Path, overrides: Sequence[str], *, seconds: float, steps: int) -> int:
    """Steps that fit into `seconds`, by the speed of a run of `steps`, of which the first fifth is left out."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "speed"
        config = load_config(
            file,
            [
                *overrides,
                f"trainer.max_steps={steps}",
                f"trainer.logging_steps={max(1, steps // 5)}",
                "trainer.save_model=false",
                "trainer.eval_strategy=no",
                "trainer.eval_max_batches=1",
                f"trainer.output_dir={run}",
            ],
        )
        train(config)
        return max(1, round(read_speed(run).steps_per_second * seconds))


def measure(
    file: Path, overrides: Sequence[str], output: Path, *, num_steps: int, data: Path, resume: bool = False
) -> dict[str, Any]:
    """Trains and scores: the metrics of the run. It starts from scratch, or resumes from its newest checkpoint."""
    start = "trainer.resume_from_checkpoint=latest" if resume else "trainer.overwrite_output_dir=true"
    config = load_config(file, [*overrides, f"trainer.max_steps={num_steps}", start, f"trainer.output_dir={output}"])
    train(config)
    loss = score(output, data, device="cpu" if config.trainer.means_cpu else "auto")
    return {
        "loss": loss.loss,
        "accuracy": loss.accuracy,
        "num_targets": loss.num_targets,
        "num_documents": loss.num_documents,
        **dataclasses.asdict(read_speed(output)),
        **describe_machine(),
        "held_out": dataclasses.asdict(HELD_OUT),
    }
