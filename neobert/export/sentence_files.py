"""The files that make `SentenceTransformer(folder)` work: the encoder, then one vector for the tokens of a text.

A model of contrastive fine-tuning keeps the pooling, the length and the prefixes it was trained with; for others the
vector is the mean over the tokens. The names of the modules are the short ones that every version of
sentence-transformers reads, and text-embeddings-inference takes the pooling from the same files.
"""

import json
from pathlib import Path
from typing import Any

from neobert.config.load import load_saved_config
from neobert.config.nesting import parse_json
from neobert.export.forms import ExportError
from neobert.model.config import ModelConfig
from neobert.objectives.base import VectorSettings
from neobert.objectives.table import choose_objective
from neobert.weights.encoder_weights import EncoderWeights

_POOLING = Path("1_Pooling") / "config.json"
_LENGTH = "sentence_bert_config.json"
_PROMPTS = "config_sentence_transformers.json"
_TOKENIZER = "tokenizer_config.json"
_MODES = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens"}


def choose_sentence_settings(weights: EncoderWeights) -> VectorSettings:
    """As the model was fine-tuned; else the mean over texts of any length that it can read.

    Raises:
        ExportError: an exported folder pools texts in a way that is none of ours, or its files are damaged.
    """
    longest, file = weights.config.max_position_embeddings, weights.folder / "config.yaml"
    if weights.layout == "checkpoint" and file.is_file():
        config = load_saved_config(file)
        vectors = choose_objective(config).vectors
        if vectors is not None:
            return vectors(config)
    if (weights.folder / _POOLING).is_file():  # An exported folder stays what it is when it is exported again.
        return _read_settings(weights.folder, longest)
    return VectorSettings(max_length=longest)


def _read_settings(folder: Path, longest: int) -> VectorSettings:
    """From files as they are written here, or as sentence-transformers 6 saves them: its length is the tokenizer's."""
    modes, ours, prompts, tokenizer = (_read(folder / name) for name in (_POOLING, _LENGTH, _PROMPTS, _TOKENIZER))
    pooling = [name for name, key in _MODES.items() if modes.get(key) or modes.get("pooling_mode") == name]
    if len(pooling) != 1:
        raise ExportError(f"{folder / _POOLING}: the pooling must be one of {', '.join(_MODES)}; set it to that")
    lengths = (ours.get("max_seq_length"), tokenizer.get("model_max_length"), longest)
    return VectorSettings(
        max_length=min(int(length) for length in lengths if length),
        pooling=pooling[0],
        prompts=tuple((name, text) for name, text in prompts.get("prompts", {}).items() if text),
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ExportError(f"{file} cannot be read ({error}); correct it") from error
    if not isinstance(content, dict):
        raise ExportError(f"{file} is no JSON object; correct it")
    return content


def write_sentence_files(output: Path, config: ModelConfig, settings: VectorSettings) -> None:
    """Writes modules.json, sentence_bert_config.json, 1_Pooling/config.json, and the prompts where there are any."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    pooling: dict[str, int | bool] = {"word_embedding_dimension": config.hidden_size}
    pooling |= {key: name == settings.pooling for name, key in _MODES.items()}
    pooling["pooling_mode_mean_sqrt_len_tokens"] = False
    (output / "1_Pooling").mkdir()
    _write(output / _POOLING, pooling)
    _write(output / "modules.json", modules)
    _write(output / _LENGTH, {"max_seq_length": settings.max_length, "do_lower_case": False})
    if settings.prompts:
        names = {"prompts": dict(settings.prompts), "default_prompt_name": None, "similarity_fn_name": "cosine"}
        _write(output / _PROMPTS, names)


def _write(file: Path, values: object) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
