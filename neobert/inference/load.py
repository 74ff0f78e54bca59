"""Loading a trained model: a checkpoint folder, or a run folder, which means its newest checkpoint."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from neobert.config.schema import TokenizerSection
from neobert.data.tokenizer import Tokenizer, load_tokenizer
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import choose_attention
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.objectives.mlm import MaskedLM
from neobert.weights.folder import find_checkpoint


def load_masked_lm(path: str | Path, *, device: str | torch.device = "cpu") -> tuple[MaskedLM, Tokenizer]:
    """The model of a run folder or checkpoint, in fp32 and evaluation mode, with its tokenizer.

    Raises:
        FileNotFoundError: there is no checkpoint at `path`.
        CheckpointError: there are some, and none of them is whole.
    """
    checkpoint = find_checkpoint(Path(path))
    if checkpoint is None:
        raise FileNotFoundError(
            f"{path} holds no checkpoint: give a run folder (with checkpoints/<step>/ in it) or one of its checkpoints"
        )
    config = ModelConfig.from_dict(json.loads((checkpoint / "model_config.json").read_text()))
    attention = choose_attention("auto", device=torch.device(device), dtype=torch.float32)
    model = MaskedLM(Encoder(config, attention), kernel=KERNELS["torch"])
    model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=True)
    model.check_tied()
    return model.to(device).eval(), load_tokenizer(TokenizerSection(path=str(checkpoint / "tokenizer")))
