"""What comes before a run is built: all that can be wrong with machine, folder, checkpoint and tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from neobert.config.schema import Config
from neobert.data.pipeline import Reader, build_tokenizer, choose_stream_lanes
from neobert.data.source.text import STREAM_LANES
from neobert.data.tokenizer import Tokenizer
from neobert.inference.teacher import bind_teacher, build_teacher, describe_teacher
from neobert.model.attention import AttentionBackend
from neobert.model.config import ModelConfig
from neobert.objectives.base import Teacher
from neobert.train.build import (
    build_attention,
    build_model_config,
    choose_rows_per_step,
)
from neobert.train.hardware.compile_check import check_compiled_gradients
from neobert.train.hardware.machine import Runtime, bind_precision, check_runtime, compute_dtype
from neobert.train.hardware.micro_batch import bind_micro_batch, choose_kept
from neobert.train.initial import bind_initial, choose_hub_encoder
from neobert.train.preempt import StopRequest
from neobert.train.processes.agreement import (
    SharedFiles,
    check_equal,
    describe_checkpoint,
    describe_config,
    describe_program,
    main_first,
)
from neobert.train.processes.parallel import choose_mesh_shape
from neobert.train.record.console import Reporter
from neobert.train.start import agree_on_start, open_output_dir, read_checkpoint_config, read_train_state
from neobert.weights.encoder_weights import EncoderWeights


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RunSetup:
    """A run that may start: its machine, folder, config and vocabulary are there, its data and model not yet."""

    config: Config
    """As it was passed, with what was chosen for `auto`."""

    runtime: Runtime
    stop: StopRequest
    reporter: Reporter
    output_dir: Path
    checkpoint: Path | None
    """Where this start continues from; None for a fresh start."""

    checkpoint_config: Config | None
    saved: dict[str, Any] | None
    """The checkpoint's `train_state.json`."""

    tokenizer: Tokenizer
    model_config: ModelConfig
    attention: AttentionBackend
    teacher: Teacher | None
    """What the run learns from, where it has one."""

    rows_per_step: int
    """Global batch, after a warm-up of the batch."""

    share: SharedFiles
    stream_lanes: int
    """Lanes of streams where the config sets no number: chosen when the run first started."""

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
            share=self.share,
            stream_lanes=self.stream_lanes,
            pin_memory=runtime.device.type == "cuda" and self.config.dataset.pin_memory is not False,
        )


def open_run(config: Config, runtime: Runtime, asked: Sequence[str] = ()) -> tuple[RunSetup, EncoderWeights | None]:
    """Checks machine and compiler, finds the checkpoint, takes the output folder, loads the tokenizer, replaces `auto`.
    Collective, within `sharing_errors`. `asked` is said too.

    Returns:
        The setup, and what `model.init_from` names, for a fresh start.

    Raises:
        StartupError: the run cannot start as configured, or its ranks differ; the message names the key and the
            remedy.
        DataError: the tokenizer cannot be used.
    """
    check_equal(runtime, lambda: {**describe_config(config), **describe_program(), "device": runtime.device.type})
    check_runtime(config)
    if config.trainer.parallel == "hsdp" and runtime.world > 1:
        check_equal(
            runtime, lambda: {"groups of trainer.parallel: hsdp": str(choose_mesh_shape(config, runtime.world))}
        )
    stop = StopRequest(max_hours=config.trainer.max_hours, is_main=runtime.is_main)
    if runtime.heartbeat is not None:
        runtime.heartbeat.is_stopping = stop.requested
    rows_per_step = choose_rows_per_step(config, runtime.world)
    start = agree_on_start(config, runtime)
    checkpoint = start.path
    check_equal(runtime, lambda: describe_checkpoint(checkpoint))
    saved = None if checkpoint is None else read_train_state(checkpoint)
    checkpoint_config = None if checkpoint is None else read_checkpoint_config(checkpoint)
    with main_first(runtime):  # It fetches what is on the hub.
        config, initial = bind_initial(config, checkpoint_config)
        config, taught = bind_teacher(config)
    config, chosen = bind_precision(config, checkpoint_config, runtime)
    runtime = runtime.with_precision(config.trainer.mixed_precision)
    attention = build_attention(config)
    checked = check_compiled_gradients(config, attention, runtime)
    trainer = config.trainer
    reporter = Reporter(active=runtime.is_main, show_progress=not trainer.disable_tqdm, mode=trainer.console)
    output_dir = open_output_dir(config, runtime, reporter, start)
    hub = choose_hub_encoder(checkpoint, initial)
    share = SharedFiles(runtime)
    tokenizer, model_config = _build_vocabulary(config, checkpoint, output_dir, runtime, reporter, hub, share)
    teacher = None if taught is None else _build_teacher(config, taught, tokenizer, runtime, reporter)
    config, more = bind_micro_batch(
        config,
        runtime,
        rows_per_step=rows_per_step,
        kept=choose_kept(config, checkpoint_config, saved, rows_per_step=rows_per_step, world=runtime.world),
        model_config=model_config,
        attention=attention,
        tokenizer=tokenizer,
        teacher=teacher,
    )
    for sentence in (*asked, *chosen, *checked, *more):
        reporter.say(sentence)
    setup = RunSetup(
        config=config,
        runtime=runtime,
        stop=stop,
        reporter=reporter,
        output_dir=output_dir,
        checkpoint=checkpoint,
        checkpoint_config=checkpoint_config,
        saved=saved,
        tokenizer=tokenizer,
        model_config=model_config,
        attention=attention,
        teacher=teacher,
        rows_per_step=rows_per_step,
        share=share,
        # Earlier versions had one number for all.
        stream_lanes=choose_stream_lanes(runtime.world) if saved is None else saved.get("stream_lanes", STREAM_LANES),
    )
    return setup, initial


def _build_vocabulary(
    config: Config,
    checkpoint: Path | None,
    output_dir: Path,
    runtime: Runtime,
    reporter: Reporter,
    hub: ModelConfig | None,
    share: SharedFiles,
) -> tuple[Tokenizer, ModelConfig]:
    """The tokenizer, and the architecture with its vocabulary; equal on all ranks."""
    tokenizer = build_tokenizer(config, checkpoint, output_dir, partial(main_first, runtime), share)
    if tokenizer.note is not None:
        reporter.warn(tokenizer.note)
    check_equal(runtime, lambda: {"tokenizer digest": tokenizer.digest, "special ids": list(tokenizer.special_ids)})
    model_config = build_model_config(config, tokenizer, hub)
    # What `model.init_from` decides beside shapes, such as model.norm_eps: every rank has read its own folder.
    check_equal(runtime, lambda: {f"model.{name}": value for name, value in model_config.to_dict().items()})
    return tokenizer, model_config


def _build_teacher(
    config: Config, weights: EncoderWeights, tokenizer: Tokenizer, runtime: Runtime, reporter: Reporter
) -> Teacher:
    """The teacher on the device; equal on all ranks."""
    teacher = build_teacher(config, weights, tokenizer, device=runtime.device, dtype=compute_dtype(config))
    check_equal(runtime, lambda: {"digest of the teacher": teacher.digest})
    reporter.say(describe_teacher(weights))
    return teacher
