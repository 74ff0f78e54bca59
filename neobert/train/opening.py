"""Opening a run: everything that can be wrong with machine, folder, checkpoint and tokenizer, before it is built."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from neobert.config.schema import Config
from neobert.data.pipeline import build_tokenizer
from neobert.data.reader import Reader
from neobert.data.tokenizer import Tokenizer
from neobert.model.attention import AttentionBackend
from neobert.model.config import ModelConfig
from neobert.train.agreement import check_equal, main_first
from neobert.train.build import build_attention, build_model_config, choose_rows_per_step
from neobert.train.compile_check import check_compiled_gradients
from neobert.train.console import Reporter
from neobert.train.facts import describe_checkpoint, describe_config, describe_program
from neobert.train.initial import bind_architecture, check_bound, load_initial_weights
from neobert.train.micro_batch import bind_micro_batch, choose_kept
from neobert.train.precision import bind_precision
from neobert.train.preempt import StopRequest
from neobert.train.runtime import Runtime, check_runtime
from neobert.train.start import agree_on_start, open_output_dir, read_checkpoint_config, read_train_state
from neobert.weights.load import EncoderWeights


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Opened:
    """A run that may begin: its machine, folder, settings and vocabulary are settled, its data and model not built."""

    config: Config
    """As it was given, with what was chosen in the place of `auto`."""

    runtime: Runtime
    stop: StopRequest
    reporter: Reporter
    output_dir: Path
    checkpoint: Path | None
    """Where this start continues from; None for a fresh start."""

    checkpoint_config: Config | None
    saved: dict[str, Any] | None
    """The checkpoint's `train_state.json`."""

    initial: EncoderWeights | None
    """What `model.init_from` names, for a fresh start."""

    tokenizer: Tokenizer
    model_config: ModelConfig
    attention: AttentionBackend
    rows_per_step: int
    """Global batch, after a warm-up of the batch."""

    @property
    def reader(self) -> Reader:
        """This process, as it reads the run's data."""
        runtime = self.runtime
        return Reader(
            rows_per_step=self.rows_per_step,
            prepared_dir=self.output_dir / "tokenized",
            rank=runtime.rank,
            world=runtime.world,
            main_first=partial(main_first, runtime),
            pin_memory=runtime.device.type == "cuda" and self.config.dataset.pin_memory is not False,
        )


def open_run(config: Config, runtime: Runtime) -> Opened:
    """Checks machine and compiler, finds the checkpoint, takes the output folder, loads the tokenizer, replaces `auto`.
    Collective, within `sharing_errors`.

    Raises:
        StartupError: the run cannot start as configured, or its ranks differ; the message names the key and the
            remedy.
        DataError: the tokenizer cannot be used.
    """
    check_equal(runtime, lambda: {**describe_config(config), **describe_program(), "device": runtime.device.type})
    check_runtime(config)
    stop = StopRequest(max_hours=config.trainer.max_hours, is_main=runtime.is_main)
    rows_per_step = choose_rows_per_step(config, runtime.world)
    start = agree_on_start(config, runtime)
    checkpoint = start.path
    check_equal(runtime, lambda: describe_checkpoint(checkpoint))
    saved = None if checkpoint is None else read_train_state(checkpoint)
    checkpoint_config = None if checkpoint is None else read_checkpoint_config(checkpoint)
    with main_first(runtime):  # It fetches what is on the hub.
        config, initial = _bind_initial(config, checkpoint_config)
    config, chosen = bind_precision(config, checkpoint_config, runtime)
    runtime = runtime.with_precision(config.trainer.mixed_precision)
    attention = build_attention(config)
    checked = check_compiled_gradients(config, attention, runtime)
    reporter = Reporter(active=runtime.is_main, show_progress=not config.trainer.disable_tqdm)
    output_dir = open_output_dir(config, runtime, reporter, start)
    tokenizer = build_tokenizer(config, checkpoint, output_dir, partial(main_first, runtime))
    if tokenizer.note is not None:
        reporter.warn(tokenizer.note)
    check_equal(runtime, lambda: {"tokenizer digest": tokenizer.digest, "special ids": list(tokenizer.special_ids)})
    model_config = build_model_config(config, tokenizer)
    # What `model.init_from` decides beside shapes, such as model.norm_eps: every rank has read its own folder.
    check_equal(runtime, lambda: {f"model.{name}": value for name, value in model_config.to_dict().items()})
    config, more = bind_micro_batch(
        config,
        runtime,
        rows_per_step=rows_per_step,
        kept=choose_kept(config, checkpoint_config, saved, rows_per_step=rows_per_step, world=runtime.world),
        model_config=model_config,
        attention=attention,
        tokenizer=tokenizer,
    )
    for sentence in (*chosen, *checked, *more):
        reporter.say(sentence)
    return Opened(
        config=config,
        runtime=runtime,
        stop=stop,
        reporter=reporter,
        output_dir=output_dir,
        checkpoint=checkpoint,
        checkpoint_config=checkpoint_config,
        saved=saved,
        initial=initial,
        tokenizer=tokenizer,
        model_config=model_config,
        attention=attention,
        rows_per_step=rows_per_step,
    )


def _bind_initial(config: Config, checkpoint_config: Config | None) -> tuple[Config, EncoderWeights | None]:
    """The config with the architecture of `model.init_from`, and its weights; a checkpoint has its own of both."""
    if checkpoint_config is None:
        return load_initial_weights(config)
    if config.model.init_from is None:
        return config, None
    config = bind_architecture(config, checkpoint_config.model)
    check_bound(config)
    return config, None
