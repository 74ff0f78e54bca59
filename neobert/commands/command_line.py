"""The command line of every command with a config: `neobert NAME CONFIG [--section.key value ...]`."""

import inspect
from collections.abc import Sequence

from neobert import cli
from neobert.config.load import config_to_yaml, load_config, split_arguments
from neobert.config.reference import build_help
from neobert.config.rules import warnings
from neobert.config.schema import Config
from neobert.errors import CallError


def parse_command_line(argv: Sequence[str], *, description: str | None, program: str) -> Config:
    """The config that `argv` describes.

    `--help` and `--print-config` print to stdout and exit with 0; nothing but the config file is read for them.
    Warnings of `--print-config` go to stderr.

    Args:
        argv: a config file, or the name of a shipped one, and overrides.
        description: the docstring of the command, for `--help`.
        program: what was typed before the arguments.

    Raises:
        CallError: there is no config file, or more than one, or an unknown option.
        ConfigError: the file or an override is wrong; all problems in one message.
    """
    usage = f"usage: {program} CONFIG.yaml [--section.key VALUE ...]"
    if any(argument in ("--help", "-h") for argument in argv):
        cli.print_result(build_help(usage, inspect.cleandoc(description or "")))
        raise SystemExit(0)
    rest = [argument for argument in argv if argument != "--print-config"]
    overrides, others = split_arguments(rest)
    path = _choose_file(others, usage)
    config = load_config(path, [f"--{key}" if text is None else f"--{key}={text}" for key, text in overrides])
    if len(rest) < len(argv):
        cli.say(*(f"warning: {warning}" for warning in warnings(config)))
        cli.print_result(config_to_yaml(config), end="")
        raise SystemExit(0)
    return config


def _choose_file(others: Sequence[str], usage: str) -> str:
    options = [argument for argument in others if argument.startswith("-")]
    if options:
        raise CallError(f"unknown option {options[0]}; --help lists all keys\n{usage}")
    if len(others) > 1:
        raise CallError(f"one config file is expected, got {len(others)}: {', '.join(others)}\n{usage}")
    if not others:
        raise CallError(f"no config file; write a file, or a name that `neobert config list` has\n{usage}")
    return others[0]
