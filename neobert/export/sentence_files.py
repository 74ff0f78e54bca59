"""The files that make `SentenceTransformer(folder)` work: the encoder, then one vector for the tokens of a text.

A model of contrastive fine-tuning keeps the pooling, the length and the prefixes it was trained with
(`neobert.weights.vector_settings`). The names of the modules are the short ones that every version of
sentence-transformers reads, and text-embeddings-inference takes the pooling from the same files.
"""

import json
from pathlib import Path

from neobert.model.config import ModelConfig
from neobert.objectives.base import VectorSettings
from neobert.weights.vector_settings import LENGTH_FILE, POOLING_FILE, POOLING_KEYS, PROMPTS_FILE


def write_sentence_files(output: Path, config: ModelConfig, settings: VectorSettings) -> None:
    """Writes modules.json, sentence_bert_config.json, 1_Pooling/config.json, and the prompts where there are any."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    pooling: dict[str, int | bool] = {"word_embedding_dimension": config.hidden_size}
    pooling |= {key: name == settings.pooling for name, key in POOLING_KEYS.items()}
    pooling["pooling_mode_mean_sqrt_len_tokens"] = False
    (output / POOLING_FILE.parent).mkdir()
    _write(output / POOLING_FILE, pooling)
    _write(output / "modules.json", modules)
    _write(output / LENGTH_FILE, {"max_seq_length": settings.max_length, "do_lower_case": False})
    if settings.prompts:
        names = {"prompts": dict(settings.prompts), "default_prompt_name": None, "similarity_fn_name": "cosine"}
        _write(output / PROMPTS_FILE, names)


def _write(file: Path, values: object) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
