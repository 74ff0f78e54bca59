"""The command line that every script with a config shares: `script.py CONFIG [--section.key value ...]`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from neobert.config.load import ConfigError, config_to_yaml, load_config, split_arguments
from neobert.config.reference import build_help
from neobert.config.rules import warnings
from neobert.config.schema import Config
from neobert.output import print_result
from neobert.secrets import scrub


def parse_command_line(argv: Sequence[str], *, description: str, program: str | None = None) -> Config:
    """The config that `argv` (without the program's name) describes.

    `--help` and `--print-config` print to stdout and exit with 0; nothing but the config file is read for them. Errors
    go to stderr, all of them together, and exit with 2; warnings of `--print-config` go to stderr too.

    Args:
        argv: A config file and overrides.
        description: One or two sentences about the script, for `--help`.
        program: The script as the user calls it; by default the path it was started with.
    """
    usage = f"usage: python {program or sys.argv[0]} CONFIG.yaml [--section.key VALUE ...]"
    if any(word in ("--help", "-h") for word in argv):
        print(build_help(usage, description))
        raise SystemExit(0)
    words = [word for word in argv if word != "--print-config"]
    overrides, others = split_arguments(words)
    path = _choose_file(others, usage)
    try:
        config = load_config(path, [f"--{key}" if text is None else f"--{key}={text}" for key, text in overrides])
    except ConfigError as error:
        _stop(str(error))
    if len(words) < len(argv):
        for warning in warnings(config):
            print(scrub(f"warning: {warning}"), file=sys.stderr)
        print_result(config_to_yaml(config), end="")
        raise SystemExit(0)
    return config


def _choose_file(others: Sequence[str], usage: str) -> str:
    options = [word for word in others if word.startswith("-")]
    if options:
        _stop(f"{usage}\nunknown option {options[0]}; --help lists all keys")
    if len(others) > 1:
        _stop(f"{usage}\none config file is expected, got {len(others)}: {', '.join(others)}")
    if not others:
        shipped = sorted(str(p) for p in Path("configs").glob("*/*.yaml") if p.parent.name != "pipelines")
        hint = f"; for example {', '.join(shipped)}" if shipped else ""
        _stop(f"{usage}\nno config file was given{hint}")
    return others[0]


def _stop(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(2)
