"""Pickles of other people's making: tensors and plain values are read, code in them is never run."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch


class UnreadablePickle(ValueError):
    """A pickle that is damaged or tries to run code; the message is the reason, without torch's advice."""


def load_pickle(path: Path, device: torch.device | str = "cpu") -> Any:
    """Tensors and plain values of a file of `torch.save`.

    Raises:
        FileNotFoundError: it is missing.
        UnreadablePickle: it is damaged, or names anything else than tensors and plain values.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        # Torch advises to load the file all the same, in several paragraphs.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it names {named[1]}, which could be any code" if named else "it is no file of torch.save"
        raise UnreadablePickle(reason) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UnreadablePickle((str(error).strip() or type(error).__name__).split(". ")[0]) from error
