"""The command line of the step benchmark. The training stack is imported only where rows of a config are asked for."""

import argparse
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from neobert.benchmark.flags import count, count_or_zero, device
from neobert.benchmark.settings import PRESETS, StepSettings

if TYPE_CHECKING:
    from neobert.benchmark.step_time import RowSource

_OF_THE_ROWS = ("preset", "vocab_size", "tied", "length", "rows", "mean_document", "probability", "padded")
"""Settings that a config decides."""

_KINDS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("vocab_size", "length", "rows", "steps", "checkpointing_every"), count),
    "warmup": count_or_zero,
    "device": device,
}
"""Types of flags that are more than the type of their default."""


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """One flag for every setting, and what reads rows from a config."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--config", help="YAML of a run: its model, and its rows through the loader")
    parser.add_argument("overrides", nargs="*", help="with --config: section.key=value laid over it")
    for field in dataclasses.fields(StepSettings):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true", default=None)
        else:
            choices = {"preset": list(PRESETS), "precision": ["bf16", "fp32"]}.get(field.name)
            kind = _KINDS.get(field.name, type(default))
            parser.add_argument(flag, type=kind, choices=choices, help=f"default: {default}")
    return parser


def read_settings(args: argparse.Namespace) -> StepSettings:
    """The settings of the flags that were given.

    Raises:
        ValueError: flags that contradict one another.
        ConfigError: in `--config`.
    """
    names = [field.name for field in dataclasses.fields(StepSettings)]
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    both = [f"--{name.replace('_', '-')}" for name in given if name in _OF_THE_ROWS]
    if args.config and both:
        raise ValueError(f"--config: it decides {', '.join(both)} too; leave these out and override keys of the config")
    if args.overrides and not args.config:
        raise ValueError(f"{args.overrides[0]}: an override needs --config FILE; flags begin with --")
    if args.config:
        from neobert.config.load import load_config  # Needs omegaconf, which made-up rows do not.

        load_config(args.config, args.overrides)  # What is wrong is said before torch is imported.
    return StepSettings(**given)


def opened_rows(args: argparse.Namespace) -> AbstractContextManager["RowSource | None"]:
    """The rows of `--config`; None without it."""
    if not args.config:
        return nullcontext()
    from neobert.benchmark.real_rows import open_rows  # Needs the whole stack, which made-up rows do not.

    return open_rows(args.config, args.overrides, pin_memory=args.device == "cuda")
