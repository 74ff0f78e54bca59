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


def load(
    path: str | Path, *, device: str | torch.device = "auto", dtype: str = "fp32", weights: str = "model"
) -> Model:
    """A trained model with its tokenizer, ready to answer.

    Args:
        path: a checkpoint; a run folder or its `checkpoints` folder, which mean the newest checkpoint; an exported
            folder; a model of the hub (`owner/model`) in a layout that `neobert.weights.layouts` knows.
        device: `auto` takes a GPU when there is one.
        dtype: `fp32`, or `bf16` for matrix products in bf16 as in training with `trainer.mixed_precision: bf16`.
        weights: `model`, or `ema` for the moving average of a checkpoint of a run with `trainer.ema_decay`.

    Raises:
        WeightsError: there is no model at `path`, or it is damaged, or has no tokenizer.
        ValueError: the dtype or the device is unknown, or not there.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is unknown; write one of {', '.join(DTYPES)}")
    chosen = choose_device(device)
    found = load_encoder_weights(path, weights=weights)
    if found.tokenizer is None:
        raise WeightsError(f"{found.folder} has no tokenizer.json; put the tokenizer of the model there")
    objective = OBJECTIVES[found.objective]
    encoder = Encoder(found.config, choose_attention("auto", device=chosen, dtype=DTYPES[dtype]))
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
            part.to(DTYPES[dtype])
    tokenizer = load_tokenizer(TokenizerSection(path=str(found.tokenizer)))
    if tokenizer.note is not None:
        warnings.warn(tokenizer.note, stacklevel=2)
    return Model(module=module.to(chosen).eval(), tokenizer=tokenizer, objective=objective)


def choose_device(device: str | torch.device) -> torch.device:
    """The device that is meant. Raises ValueError for one that this machine does not have."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: {device!r} is unknown; write auto, cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device} is not here (torch sees no GPU); write cpu or auto")
    return chosen
