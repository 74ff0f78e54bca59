"""Commands that measure. Libraries are imported after the arguments are read.

`benchmark` on made-up rows needs torch and numpy alone, so what needs more is imported where it is needed.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neobert import cli
from neobert.benchmark.settings import CONTESTANTS, PRECISIONS, PRESETS, SHAPES, AgainstSettings, StepSettings
from neobert.commands.flags import (
    add_input,
    add_json,
    build_experiment_parser,
    build_files_parser,
    build_model_parser,
    build_parser,
    count,
    count_or_zero,
    device,
    fraction,
    parse_experiment,
    print_answer,
    seconds,
)

if TYPE_CHECKING:
    from neobert.config.schema import Config
    from neobert.data.tokenizer import Tokenizer

_OF_THE_ROWS = ("preset", "vocab_size", "tied", "length", "rows", "mean_document", "probability", "padded")
"""Settings of `benchmark` that a config decides."""

_KINDS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("vocab_size", "length", "rows", "steps", "checkpointing_every"), count),
    "warmup": count_or_zero,
    "device": device,
}
"""Types of flags that are more than the type of their default."""

_PRECISION: dict[str, Any] = {"default": "auto", "choices": PRECISIONS, "help": "of products (default: %(default)s)"}
_CHOICES = {
    "preset": list(PRESETS),
    "precision": list(PRECISIONS),
    "fp8": ["no", "rowwise", "emulated"],
    "compile_backend": ["inductor", "aot_eager", "eager"],
}


def benchmark(program: str, argv: list[str]) -> None:
    """Tokens per second, utilisation and memory of the training step, on made-up rows or on those of a config.

    neobert benchmark --preset small
    neobert benchmark --preset neobert --length 1024 --rows 64 --device cuda --compile
    neobert benchmark --config quickstart dataset.max_seq_length=128
    """
    parser = build_parser(program, benchmark.__doc__)
    add_json(parser)
    parser.add_argument("--config", help="YAML of a run: its model, and its rows through the loader")
    parser.add_argument("overrides", nargs="*", help="with --config: section.key=value laid over it")
    for field in dataclasses.fields(StepSettings):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true", default=None)
        else:
            kind = _KINDS.get(field.name, type(default))
            parser.add_argument(flag, type=kind, choices=_CHOICES.get(field.name), help=f"default: {default}")
    args = parser.parse_args(argv)
    settings = _read_step_settings(args)
    from neobert.benchmark.step_time import RowSource, describe, measure_step

    source: AbstractContextManager[RowSource | None] = nullcontext()
    if args.config:
        from neobert.benchmark.real_rows import open_rows  # Needs the whole stack, which made-up rows do not.

        source = open_rows(args.config, args.overrides, pin_memory=args.device == "cuda")
    with source as rows:
        measured = measure_step(settings, rows)
    both = {"settings": dataclasses.asdict(settings), **dataclasses.asdict(measured)}
    print_answer(both, describe(settings, measured), as_json=args.json)


def _read_step_settings(args: argparse.Namespace) -> StepSettings:
    explicit = cli.explicit_values(args, StepSettings)
    both = [f"--{name.replace('_', '-')}" for name in explicit if name in _OF_THE_ROWS]
    if args.config and both:
        raise ValueError(f"--config: it decides {', '.join(both)} too; leave these out and override keys of the config")
    if args.overrides and not args.config:
        raise ValueError(f"{args.overrides[0]}: an override needs --config FILE; flags start with --")
    if args.config:
        from neobert.config.load import load_config  # Needs omegaconf, which made-up rows do not.

        load_config(args.config, args.overrides)  # What is wrong is said before torch is imported.
    return StepSettings(**explicit)


def benchmark_transformers(program: str, argv: list[str]) -> None:
    """Our training step against a plain loop on transformers and against our own reference paths, on real text (CPU).

    neobert benchmark-transformers TEXT.jsonl --tokenizer FOLDER
    """
    parser = build_parser(program, benchmark_transformers.__doc__)
    parser.add_argument("text", help="JSONL file (or .gz) with a field `text`")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--rounds", type=count, default=3, help="turns of each, of which the median counts")
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    for field in dataclasses.fields(AgainstSettings)[2:]:
        kind, choices = _KINDS.get(field.name, str), _CHOICES.get(field.name)
        parser.add_argument(
            f"--{field.name}", type=kind, choices=choices, default=field.default, help="default: %(default)s"
        )
    args = parser.parse_args(argv)
    from neobert.benchmark.against import compare

    cli.print_result(compare(AgainstSettings(**cli.explicit_values(args, AgainstSettings)), args.only, args.rounds))


PAIR_VARIANTS = ("unpadded", "padded", "cached", "whole", "accumulated")
"""`neobert.contrastive.pair_benchmark` says what each is."""


def benchmark_contrastive(program: str, argv: list[str]) -> None:
    """Pairs per second and peak memory of contrastive steps: unpadded and padded, cached gradients and the whole batch.

    neobert benchmark-contrastive --model outputs/run --pairs my_pairs.jsonl --batch-size 64
    """
    args = parse_pair_benchmark(program, argv)
    from neobert.contrastive.pair_benchmark import run_benchmark

    run_benchmark(args)


def parse_pair_benchmark(program: str, argv: list[str]) -> argparse.Namespace:
    """The arguments of `pair_benchmark`."""
    parser = build_parser(program, benchmark_contrastive.__doc__)
    parser.add_argument(
        "--model", help="run, checkpoint or exported folder; default: random weights of the sizes below"
    )
    parser.add_argument("--pairs", help="file or folder of pairs (needs --model); default: random texts")
    parser.add_argument("--variants", nargs="+", default=list(PAIR_VARIANTS), choices=PAIR_VARIANTS)
    parser.add_argument("--batch-size", type=int, default=32, help="pairs (default %(default)s)")
    parser.add_argument("--cached-batch-size", type=int, default=1024, help="pairs (default %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps; the median counts (default %(default)s)")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text (default %(default)s)")
    parser.add_argument("--median-length", type=float, default=16.0, help="of random texts (default %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=30592)
    parser.add_argument("--dtype", **_PRECISION)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; default: torch's choice")
    args = parser.parse_args(argv)
    if args.pairs is not None and args.model is None:
        parser.error("--pairs needs --model, whose tokenizer reads them")
    return args


def benchmark_inference(program: str, argv: list[str]) -> None:
    """Tokens per second of a model, packed, against the same weights in transformers with padded batches.

    neobert benchmark-inference MODEL INPUT
    """
    parser = build_model_parser(program, benchmark_inference.__doc__)
    add_input(parser)
    parser.add_argument("--documents", type=count, default=512, help="texts to use (default %(default)s)")
    parser.add_argument("--batch-tokens", type=count, help="packed (default 8192)")
    parser.add_argument("--rows", type=count, default=32, help="texts of a padded batch (default %(default)s)")
    parser.add_argument("--repeats", type=count, default=5, help="measurements, of which the median counts")
    args = parser.parse_args(argv)
    if args.dtype == "bf16":
        raise ValueError("--dtype: the two are compared in fp32; leave it out")
    import torch

    from neobert.benchmark.inference import compare
    from neobert.inference.model import load
    from neobert.inference.packed import BATCH_TOKENS
    from neobert.inference.texts import open_texts

    with open_texts(args.input, text_column=args.text_column, split=args.split) as opened:
        texts = [text.text for text in islice(opened.read(), args.documents)]
    model = load(args.model, device=args.device, dtype="fp32")
    batch_tokens = args.batch_tokens or BATCH_TOKENS
    lines = compare(model, texts, batch_tokens=batch_tokens, rows=args.rows, repeats=args.repeats)
    machine = f"{torch.get_num_threads()} threads on {model.module.head_weight.device}"
    cli.print_result("\n".join([*lines, machine]))


def benchmark_input(program: str, argv: list[str]) -> None:
    """Tokens per second and packing fill of the input pipeline, against `datasets.map` with a greedy collator.

    neobert benchmark-input FILES --tokenizer FOLDER
    """
    parser = build_files_parser(program, benchmark_input.__doc__, rows=8, repeats=3)
    parser.add_argument("--batches", type=count, default=2000, help="batches of one measurement (default: %(default)s)")
    args = parser.parse_args(argv)
    config, tokenizer = _read_files_config(args)
    from neobert.benchmark.input_pipeline import compare

    compare(config, tokenizer, args.files, args.batches, args.repeats)


def benchmark_resume(program: str, argv: list[str]) -> None:
    """Seconds to the first batch of a resumed run at 1%, 50% and 99% of an epoch, streamed and indexed.

    neobert benchmark-resume FILES --tokenizer FOLDER
    """
    args = build_files_parser(program, benchmark_resume.__doc__, rows=16, repeats=5).parse_args(argv)
    config, tokenizer = _read_files_config(args)
    from neobert.benchmark.resume_cost import measure

    measure(config, tokenizer, (0.01, 0.5, 0.99), args.repeats)


def _read_files_config(args: argparse.Namespace) -> tuple["Config", "Tokenizer"]:
    """The config that the flags of `build_files_parser` describe, and its tokenizer."""
    from neobert.config.load import parse_config

    config = parse_config(
        "",
        [
            f"dataset.path={args.files}",
            f"tokenizer.path={args.tokenizer}",
            f"dataset.max_seq_length={args.max_seq_length}",
            f"model.max_position_embeddings={args.max_seq_length}",
            f"trainer.per_device_train_batch_size={args.rows}",
            "trainer.max_steps=1",
        ],
    )
    from neobert.data.tokenizer import load_tokenizer

    return config, load_tokenizer(config.tokenizer)


def benchmark_loss(program: str, argv: list[str]) -> None:
    """Time and memory of the loss kernels, forward and backward: `neobert benchmark-loss --device cuda`."""
    parser = build_parser(program, benchmark_loss.__doc__)
    parser.add_argument("--kernels", nargs="+", default=["torch", "reference", "triton", "liger"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--precision", **_PRECISION)
    parser.add_argument("--device", type=device, default="cpu", help="default: %(default)s")
    parser.add_argument("--repeats", type=count, default=3, help="default: %(default)s")
    args = parser.parse_args(argv)
    from neobert.benchmark.loss_kernels import table

    cli.print_result(table(args.kernels, args.shapes, args.precision, args.device, args.repeats))


def benchmark_optimizers(program: str, argv: list[str]) -> None:
    """Time of every optimizer's step as a fraction of the training step, and how orthogonal Muon's updates are.

    neobert benchmark-optimizers --steps 10
    neobert benchmark-optimizers --preset neobert --length 1024 --rows 64 --device cuda
    """
    parser = build_parser(program, benchmark_optimizers.__doc__)
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--precision", **_PRECISION)
    for flag, default in (("--length", 512), ("--rows", 8), ("--steps", 10)):
        parser.add_argument(flag, type=count, default=default, help="default: %(default)s")
    parser.add_argument("--warmup", type=count_or_zero, default=2, help="default: %(default)s")
    parser.add_argument("--device", type=device, default="cpu", help="default: %(default)s")
    parser.add_argument("--width", type=count, default=256, help="side of the matrices made orthogonal")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread, for a busy machine")
    args = parser.parse_args(argv)
    from neobert.benchmark.optimizer_cost import (
        describe_orthogonality,
        describe_times,
        measure_orthogonality,
        measure_times,
    )

    settings = StepSettings(**cli.explicit_values(args, StepSettings))
    cli.print_result(describe_times(measure_times(settings, cpu_time=args.cpu_time)))
    cli.print_result(describe_orthogonality(measure_orthogonality(width=args.width)))


def benchmark_save(program: str, argv: list[str]) -> None:
    """What a checkpoint costs to save and to load: `neobert benchmark-save` (250 million parameters)."""
    parser = build_parser(program, benchmark_save.__doc__)
    parser.add_argument("--hidden-size", type=count, default=768)
    parser.add_argument("--num-layers", type=count, default=32, help="32 of width 768 are 252 million parameters")
    parser.add_argument("--vocab-size", type=count, default=32768)
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary folder)")
    args = parser.parse_args(argv)
    if args.folder is not None and not args.folder.is_dir():
        parser.error(f"--folder: {args.folder} is not a folder; make it first")
    from neobert.benchmark.save_cost import build_config, measure

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        config = build_config(
            Path(folder), hidden_size=args.hidden_size, num_layers=args.num_layers, vocab_size=args.vocab_size
        )
        cli.print_result(measure(config, args.repeats).table())


def analyze_profile(program: str, argv: list[str]) -> None:
    """Where the time of profiled steps went: `neobert analyze-profile RUN_FOLDER_OR_TRACE [--json]`.

    Train with --trainer.profiler_steps_start N --trainer.profiler_steps K to have a trace.
    """
    parser = build_parser(program, analyze_profile.__doc__)
    parser.add_argument("path", type=Path, help="folder of a run, or a trace of torch's profiler")
    add_json(parser)
    args = parser.parse_args(argv)
    from neobert.benchmark.profile_analysis import analyse_path, describe

    analysis = analyse_path(args.path)
    cli.print_result(analysis.as_json() if args.json else describe(analysis))


def compare(program: str, argv: list[str]) -> None:
    """Train the runs of a plan one by one and compare them: `neobert compare PLAN --data FOLDER`.

    Prints a table; it, results.json and the picture results.svg are beside the runs. Type the same command again after
    an interruption: finished runs are not made again, one that was killed resumes.
    """
    parser = build_experiment_parser(program, compare.__doc__, file_help="plan, such as optimizers")
    parser.add_argument("--only", metavar="NAMES", help="entries of the plan to run now, separated by commas")
    parser.add_argument("--check", action="store_true", help="check all configs, list the runs, train nothing")
    parser.add_argument("--keep-weights", action="store_true", help="keep the checkpoints of runs that were scored")
    options, overrides = parse_experiment(parser, argv)
    from neobert.benchmark.experiment_plan import Workspace, check_plan, choose_variants, grid, load_plan

    workspace = Workspace(
        output=options.output, data=options.data, overrides=tuple(overrides), keep_weights=options.keep_weights
    )
    plan = load_plan(options.file)
    chosen = choose_variants(plan, options.only)
    check_plan(chosen, workspace)
    from neobert.benchmark import trial
    from neobert.benchmark.experiments import compare as run_and_compare

    trial.use_threads(options.threads)
    trial.check_data(workspace.data)
    if options.check:
        cli.print_result("\n".join(job.name for variant in chosen.variants for job in grid(variant)))
    else:
        cli.print_result(run_and_compare(plan, chosen, workspace))


SECONDS = 417.0
"""Seven minutes without three seconds: the training time of the runs that the yardstick was first read from."""


def yardstick(program: str, argv: list[str]) -> None:
    """How much a config learns in seven minutes of training: `neobert yardstick CONFIG --data FOLDER`.

    Prints one JSON line with the held-out loss (nats per masked token), the steps, tokens and seconds of training. The
    speed is measured first, on a throw-away run, to know how many steps fit.
    """
    parser = build_experiment_parser(program, yardstick.__doc__, file_help="config of the run")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of training (default %(default)s)")
    parser.add_argument("--steps", type=count, help="make so many steps, whatever the time: repeats an earlier run")
    parser.add_argument("--speed-steps", type=count, default=50, help="of the throw-away run (default 50)")
    options, overrides = parse_experiment(parser, argv)
    from neobert.config.load import load_config

    config = load_config(options.file, [*overrides, "trainer.max_steps=1"])  # What is wrong is said first.
    from neobert.benchmark import trial
    from neobert.benchmark.trial import measure, measure_steps

    trial.use_threads(options.threads)
    trial.check_data(options.data)
    overrides += trial.fix_precision(config)
    steps = options.steps or measure_steps(options.file, overrides, seconds=options.seconds, steps=options.speed_steps)
    result = measure(options.file, overrides, options.output, num_steps=steps, data=options.data)
    budget = None if options.steps else options.seconds
    described = {"config": str(options.file), "settings": overrides, "budget_seconds": budget}
    print_answer(described | result, "", as_json=True)


def kill_storm(program: str, argv: list[str]) -> int:
    """Kill a run again and again at random instants, and compare it with one left alone.

    A run of 300 steps is trained once in peace, then killed after random times and resumed with `latest` until it is
    finished; again in fresh folders until the number of kills is reached. Exit code 1 when one differs.
    """
    parser = build_parser(program, kill_storm.__doc__)
    parser.add_argument("folder", type=Path, help="an empty or new folder to work in")
    parser.add_argument("--launcher", action="store_true", help="half of the kills are of torchrun (SIGKILL, SIGTERM)")
    parser.add_argument("--into-saves", type=fraction, default=0, help="fraction of the kills that wait for a save")
    parser.add_argument("--kills", type=count, default=200)
    parser.add_argument("--life", type=seconds, help="longest life in seconds (default: half of the peaceful run)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=count, default=1, help="of the run; a kill is of one of them")
    parser.add_argument("overrides", nargs="*", help="further settings, for example trainer.async_save=true")
    args = parser.parse_intermixed_args(argv)
    folder: Path = args.folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        parser.error(f"{folder} is not an empty folder")
    from neobert.benchmark.kill_storm import run_storms

    chosen = {name: value for name, value in vars(args).items() if name not in ("folder", "overrides", "processes")}
    return run_storms(folder, args.overrides, world=args.processes, **chosen)
