"""A folder for servers that know Llama layouts and not EuroBERT: the same tensors under a second config.

EuroBERT's blocks are Llama's with attention in both directions. `LlamaBidirectionalModel` is the name that vLLM's
registry has for that; it reads the pooling from `pooling` of config.json.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

LLAMA_FOLDER = "vllm"
LLAMA_POOLING = {"mean": "avg", "cls": "cls"}
"""Our poolings by the names of LlamaBidirectionalModel."""

_COPIED = ("tokenizer.json", "tokenizer_config.json", "modules.json", "sentence_bert_config.json")
_PROJECTION = "lm_head."


def write_llama(folder: Path, pooling: str) -> None:
    """Writes LLAMA_FOLDER below a native folder, from what is in that."""
    output = folder / LLAMA_FOLDER
    output.mkdir()
    native = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = llama_config(native, pooling)
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(_PROJECTION)}
    save_file(kept, output / "model.safetensors", metadata={"format": "pt"})
    for name in _COPIED:
        shutil.copyfile(folder / name, output / name)
    shutil.copytree(folder / "1_Pooling", output / "1_Pooling")


def llama_config(native: dict[str, Any], pooling: str) -> dict[str, Any]:
    """config.json for the Llama layout, from that of EuroBERT."""
    shared = {key: native[key] for key in _SHARED}
    return {
        "architectures": ["LlamaBidirectionalModel"],
        "model_type": "llama",
        **shared,
        # What servers on older versions of transformers read.
        "rope_theta": native["rope_parameters"]["rope_theta"],
        "is_causal": False,
        "pooling": LLAMA_POOLING[pooling],
        "use_cache": False,
    }


_SHARED = (
    "dtype",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "vocab_size",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "attention_dropout",
    "initializer_range",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
