"""Types of flags that the command lines of benchmarks share: a wrong value is refused by the parser, before anything is
measured."""

import argparse


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
    import torch  # Only where a device is asked about, which `--help` does not.

    try:
        kind = torch.device(text).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; write cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text} is not here (torch sees no GPU); write cpu")
    return text
