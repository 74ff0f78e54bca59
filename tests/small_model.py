"""A checkpoint of a small model with random weights, in a run folder of its own: nothing is trained."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from neobert.config.schema import TokenizerSection
from neobert.data.tokenizer import load_tokenizer
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.objectives.mlm import MaskedLM
from neobert.objectives.table import OBJECTIVES
from neobert.weights.folder import HEAD_FILE, MANIFEST, Manifest, record_file


def write_run(
    run: Path,
    tokenizer_folder: Path,
    *,
    step: int = 12,
    objective: str | None = None,
    head: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """The run, whose newest checkpoint holds a masked language model, or a model of `objective` with its `head`."""
    tokenizer = load_tokenizer(TokenizerSection(path=str(tokenizer_folder)))
    torch.manual_seed(1)
    values = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
        "vocab_size": 384,
        "pad_token_id": tokenizer.pad_id,
        "embedding_init_range": 0.3,
        "decoder_init_range": 0.2,
    }
    config = ModelConfig(**{**values, **settings})
    encoder = Encoder(config, ATTENTION["sdpa"])
    if objective is None:
        model = MaskedLM(encoder, kernel=KERNELS["torch"])
    else:
        model = OBJECTIVES[objective].build_trained(encoder, head)
    checkpoint = run / "checkpoints" / str(step)
    checkpoint.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, checkpoint / "model.safetensors")
    (checkpoint / "model_config.json").write_text(json.dumps(config.to_dict()))
    (checkpoint / "train_state.json").write_text(json.dumps({"step": step}))
    if head is not None:
        (checkpoint / HEAD_FILE).write_text(json.dumps(head))
    tokenizer.save(checkpoint / "tokenizer")
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    records = {path.relative_to(checkpoint).as_posix(): record_file(path) for path in files}
    (checkpoint / MANIFEST).write_text(Manifest(step=step, world_size=1, files=records).to_text())
    return run
