"""Pretraining and using BERT-like encoders: `load_config`, `pretrain`, and `load` for a trained model."""

import importlib
from typing import TYPE_CHECKING, Any

from neobert.host import prepare_threads

if TYPE_CHECKING:
    from neobert.config.load import load_config
    from neobert.inference.model import load
    from neobert.train.loop import pretrain

__all__ = ["load", "load_config", "pretrain"]

_HOMES = {"load": "inference.model", "load_config": "config.load", "pretrain": "train.loop"}


def __getattr__(name: str) -> Any:
    # On first use: the tokenizer brings transformers, which takes seconds, and a bare GPU machine has torch alone.
    if name in _HOMES:
        prepare_threads()
        return getattr(importlib.import_module(f"neobert.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'neobert' has no attribute {name!r}")
