"""Pretraining and using BERT-like encoders. `neobert.load(path)` gives a trained model with its tokenizer."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neobert.inference.load import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # On first use: the tokenizer brings transformers, which takes seconds, and a bare GPU machine has torch alone.
    if name == "load":
        return importlib.import_module("neobert.inference.load").load
    raise AttributeError(f"module 'neobert' has no attribute {name!r}")
