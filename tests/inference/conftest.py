"""A small model of random weights, and a run folder that holds it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import neobert
from neobert.config.schema import TokenizerSection
from neobert.data.tokenizer import load_tokenizer
from neobert.inference.model import Model
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.objectives.mlm import MaskedLM
from neobert.weights.folder import MANIFEST, Manifest, record_file


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A run whose newest checkpoint, of step 12, holds the model; the one of step 7 is empty of weights."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = load_tokenizer(TokenizerSection(path=str(tokenizer_folder)))
    torch.manual_seed(1)
    config = ModelConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
        vocab_size=384,
        pad_token_id=tokenizer.pad_id,
        embedding_init_range=0.3,
        decoder_init_range=0.2,
    )
    model = MaskedLM(Encoder(config, ATTENTION["sdpa"]), kernel=KERNELS["torch"])
    checkpoint = folder / "checkpoints" / "12"
    checkpoint.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, checkpoint / "model.safetensors")
    (checkpoint / "model_config.json").write_text(json.dumps(config.to_dict()))
    (checkpoint / "train_state.json").write_text('{"step": 12}')
    tokenizer.save(checkpoint / "tokenizer")
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    records = {path.relative_to(checkpoint).as_posix(): record_file(path) for path in files}
    (checkpoint / MANIFEST).write_text(Manifest(step=12, world_size=1, files=records).to_text())
    return folder


@pytest.fixture(scope="session")
def loaded(run_folder: Path) -> Model:
    return neobert.load(run_folder, device="cpu")


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """Thirty texts, two bad records (lines 4 and 9) and a blank line."""
    lines = [json.dumps({"text": text}) for text in texts[:30]]
    lines[3:3], lines[8:8], lines[12:12] = ["{bad"], ['["array"]'], [""]
    file = tmp_path_factory.mktemp("jsonl") / "mine.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file
