"""What the command lines of benchmarks share: types of flags, so that a wrong value is refused by the parser before
anything is measured, and the end of a command that cannot measure. Torch suffices."""

import argparse
import sys
from collections.abc import Callable

import torch


def count(text: str) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number of at least 1")
    return int(text)


def count_or_zero(text: str) -> int:
    """A number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: write a number of at least 0")
    return int(text)


def device(text: str) -> str:
    """The name of a device that this machine has."""
    try:
        kind = torch.device(text).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; write cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text} is not here (torch sees no GPU); write cpu")
    return text


def exit_code(work: Callable[[], object], *, mendable: tuple[type[Exception], ...] = (ValueError,)) -> int:
    """0 after `work`; what the user can mend becomes one sentence and 2."""
    try:
        work()
    except mendable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
