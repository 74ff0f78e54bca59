"""The files that make `SentenceTransformer(folder)` work: the encoder, then one vector for the tokens of a text.

A model of contrastive fine-tuning keeps the pooling, the length and the prefixes it was trained with
(`neobert.weights.vector_settings`). The names of the modules are the short ones that every version of
sentence-transformers reads, and text-embeddings-inference takes the pooling from the same files.

A model that keeps the vectors of all tokens is one for `MultiVectorEncoder(folder)`, of sentence-transformers 6.
"""

import json
from pathlib import Path
from typing import Any

from neobert.model.config import ModelConfig
from neobert.objectives.base import VectorSettings
from neobert.objectives.late_interaction import TOKENS
from neobert.weights.vector_settings import LENGTH_FILE, MULTI_VECTOR, POOLING_FILE, POOLING_KEYS, PROMPTS_FILE

_TRANSFORMER = "sentence_transformers.models.Transformer"
_NORMALIZE = "sentence_transformers.base.modules.normalize.Normalize"
_MASK = "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask"


def write_sentence_files(output: Path, config: ModelConfig, settings: VectorSettings) -> None:
    """Writes modules.json, sentence_bert_config.json, the folders of the modules, and prompts where there are any."""
    _write(output / LENGTH_FILE, {"max_seq_length": settings.max_length, "do_lower_case": False})
    prompts = {"prompts": dict(settings.prompts), "default_prompt_name": None}
    if settings.pooling == TOKENS:
        _write_multi_vector(output)
        _write(output / PROMPTS_FILE, {"model_type": MULTI_VECTOR, **prompts, "similarity_fn_name": "meanmaxsim"})
        return
    pooling: dict[str, int | bool] = {"word_embedding_dimension": config.hidden_size}
    pooling |= {key: name == settings.pooling for name, key in POOLING_KEYS.items()}
    pooling["pooling_mode_mean_sqrt_len_tokens"] = False
    _write_modules(output, {POOLING_FILE.parent.name: ("sentence_transformers.models.Pooling", pooling)})
    if settings.prompts:
        _write(output / PROMPTS_FILE, {**prompts, "similarity_fn_name": "cosine"})


def _write_multi_vector(output: Path) -> None:
    modules: dict[str, tuple[str, dict[str, Any]]] = {
        "1_Normalize": (_NORMALIZE, {"module_input_name": "token_embeddings"}),
        "2_MultiVectorMask": (_MASK, {"skiplist_words": []}),
    }
    _write_modules(output, modules)


def _write_modules(output: Path, modules: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """The list of modules after the encoder, and the config of each in a folder of its own."""
    listed = [{"idx": 0, "name": "0", "path": "", "type": _TRANSFORMER}]
    for number, (name, (kind, config)) in enumerate(modules.items(), start=1):
        (output / name).mkdir()
        _write(output / name / "config.json", config)
        listed.append({"idx": number, "name": str(number), "path": name, "type": kind})
    _write(output / "modules.json", listed)


def _write(file: Path, values: object) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
