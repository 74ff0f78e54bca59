"""Loading a trained model: a checkpoint folder, or a run folder, which means its newest checkpoint."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from neobert.config.schema import TokenizerSection
from neobert.data.tokenizer import Tokenizer, load_tokenizer
from neobert.inference.model import Model
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import choose_attention
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.objectives.mlm import MaskedLM
from neobert.weights.folder import find_checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(path: str | Path, *, device: str | torch.device = "auto", dtype: str = "fp32") -> Model:
    """A trained model with its tokenizer, ready to answer.

    Args:
        path: a checkpoint folder, or a run folder or its `checkpoints` folder, which mean the newest checkpoint.
        device: `auto` takes a GPU when there is one.
        dtype: `fp32`, or `bf16` for matrix products in bf16 as in training with `trainer.mixed_precision: bf16`.

    Raises:
        FileNotFoundError: there is no model at `path`.
        CheckpointError: there are checkpoints, and none of them is whole.
        ValueError: the dtype or the device is unknown, or not there.
    """
    masked_lm, tokenizer = load_masked_lm(path, device=device, dtype=dtype)
    return Model(masked_lm=masked_lm, tokenizer=tokenizer)


def load_masked_lm(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: str = "fp32"
) -> tuple[MaskedLM, Tokenizer]:
    """The model at `path` in evaluation mode, and its tokenizer; see `load`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is unknown; write one of {', '.join(DTYPES)}")
    place = choose_device(device)
    config, weights, tokenizer_folder = _read_weights(Path(path))
    model = MaskedLM(
        Encoder(config, choose_attention("auto", device=place, dtype=DTYPES[dtype])), kernel=KERNELS["torch"]
    )
    model.load_state_dict(weights, strict=True)
    model.check_tied()
    for module in model.modules():
        if isinstance(module, nn.Linear):  # Embeddings and norms stay fp32, and with them the residual stream.
            module.to(DTYPES[dtype])
    return model.to(place).eval(), load_tokenizer(TokenizerSection(path=str(tokenizer_folder)))


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


def _read_weights(path: Path) -> tuple[ModelConfig, dict[str, torch.Tensor], Path]:
    """Architecture, weights by their names here, and the folder of the tokenizer: what kinds of places are read."""
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise FileNotFoundError(
            f"{path} holds no checkpoint: give a run folder (with checkpoints/<step>/ in it) or one of its checkpoints"
        )
    config = ModelConfig.from_dict(json.loads((checkpoint / "model_config.json").read_text()))
    return config, load_file(checkpoint / "model.safetensors"), checkpoint / "tokenizer"
