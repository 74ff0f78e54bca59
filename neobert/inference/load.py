"""Loading a trained model: a checkpoint folder, or a run folder, which means its newest checkpoint."""

import warnings
from pathlib import Path

import torch
from torch import nn

from neobert.config.schema import TokenizerSection
from neobert.data.tokenizer import Tokenizer, load_tokenizer
from neobert.inference.model import Model
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import choose_attention
from neobert.model.encoder import Encoder
from neobert.objectives.mlm import MaskedLM
from neobert.weights.describe import WeightsError
from neobert.weights.load import load_encoder_weights

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
    masked_lm, tokenizer = load_masked_lm(path, device=device, dtype=dtype, weights=weights)
    return Model(masked_lm=masked_lm, tokenizer=tokenizer)


def load_masked_lm(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: str = "fp32", weights: str = "model"
) -> tuple[MaskedLM, Tokenizer]:
    """The model at `path` in evaluation mode, and its tokenizer; see `load`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is unknown; write one of {', '.join(DTYPES)}")
    place = choose_device(device)
    found = load_encoder_weights(path, weights=weights)
    if found.tokenizer is None:
        raise WeightsError(f"{found.folder} has no tokenizer.json; put the tokenizer of the model there")
    config = found.config
    model = MaskedLM(
        Encoder(config, choose_attention("auto", device=place, dtype=DTYPES[dtype])), kernel=KERNELS["torch"]
    )
    model.load_state_dict({name: tensor.float() for name, tensor in found.tensors.items()}, strict=True)
    model.check_tied()
    for module in model.modules():
        if isinstance(module, nn.Linear):  # Embeddings and norms stay fp32, and with them the residual stream.
            module.to(DTYPES[dtype])
    tokenizer = load_tokenizer(TokenizerSection(path=str(found.tokenizer)))
    if tokenizer.note is not None:
        warnings.warn(tokenizer.note, stacklevel=3)
    return model.to(place).eval(), tokenizer


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
