"""Loading a trained model: a checkpoint folder, or a run folder, which means its newest checkpoint."""

import warnings
from pathlib import Path

import torch
from torch import nn

from neobert.config.schema import TokenizerSection
from neobert.data.tokenizer import load_tokenizer
from neobert.inference.model import Model
from neobert.model.attention import choose_attention
from neobert.model.encoder import Encoder
from neobert.objectives.base import ObjectiveModule
from neobert.objectives.table import OBJECTIVES
from neobert.weights.describe import WeightsError
from neobert.weights.encoder_weights import load_encoder_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Beside `auto`, see `choose_dtype`."""


def load(
    path: str | Path, *, device: str | torch.device = "auto", dtype: str = "auto", weights: str = "model"
) -> Model:
    """A trained model with its tokenizer, ready to answer.

    Args:
        path: a checkpoint; a run folder or its `checkpoints` folder, which mean the newest checkpoint; an exported
            folder; a model of the hub (`owner/model`) in a layout that `neobert.weights.layouts` knows.
        device: `auto` takes a GPU when there is one.
        dtype: of matrix products: `fp32`; `bf16`, as in training with `trainer.mixed_precision: bf16`; `auto` is bf16
            on a GPU that has it, else fp32. fp32 on a GPU is TF32 only where `torch.set_float32_matmul_precision` was
            called for it.
        weights: `model`, or `ema` for the moving average of a checkpoint of a run with `trainer.ema_decay`.

    Raises:
        WeightsError: there is no model at `path`, or it is damaged, or has no tokenizer.
        ValueError: the dtype or the device is unknown, or not there.
    """
    place = choose_device(device)
    products = choose_dtype(dtype, place)
    found = load_encoder_weights(path, weights=weights)
    if found.tokenizer is None:
        raise WeightsError(f"{found.folder} has no tokenizer.json; put the tokenizer of the model there")
    objective = OBJECTIVES[found.objective]
    encoder = Encoder(
        found.config, choose_attention("auto", device=place, dtype=products, head_dim=found.config.head_dim)
    )
    # An exported folder has the head of no objective.
    has_head = bool(found.training_only) or objective.fills_masks
    module = objective.build_trained(encoder) if has_head else ObjectiveModule(encoder)
    tensors = {**found.training_only, **found.tensors}
    module.load_state_dict(
        {name: tensors[name].float() for name in module.state_dict() if name in tensors}, strict=True
    )
    module.check_tied()
    for part in module.modules():
        if isinstance(part, nn.Linear):  # Embeddings and norms stay fp32, and with them the residual stream.
            part.to(products)
    tokenizer = load_tokenizer(TokenizerSection(path=str(found.tokenizer)))
    if tokenizer.note is not None:
        warnings.warn(tokenizer.note, stacklevel=2)
    return Model(module=module.to(place).eval(), tokenizer=tokenizer, objective=objective)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The type of matrix products that is meant. Raises ValueError for an unknown name."""
    if dtype == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is unknown; write one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def choose_device(device: str | torch.device) -> torch.device:
    """The device that is meant. Raises ValueError for one that this machine does not have."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: {device!r} is unknown; write auto, cpu or cuda") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device} is not here (torch sees no GPU); write cpu or auto")
    return place
