"""How a model makes vectors of texts: pooling, length and prefixes, as its folder says.

A model of contrastive fine-tuning keeps what it was trained with; for others the vector is the mean over the tokens.
"""

from pathlib import Path
from typing import Any

from neobert.config.load import load_saved_config
from neobert.config.nesting import parse_json
from neobert.config.schema import Config
from neobert.objectives.base import VectorSettings
from neobert.objectives.late_interaction import TOKENS
from neobert.objectives.table import choose_objective
from neobert.weights.describe import WeightsError
from neobert.weights.encoder_weights import EncoderWeights

POOLING_FILE = Path("1_Pooling") / "config.json"
LENGTH_FILE = "sentence_bert_config.json"
PROMPTS_FILE = "config_sentence_transformers.json"
_TOKENIZER = "tokenizer_config.json"
POOLING_KEYS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens"}
"""Our poolings to one vector, by the keys of sentence-transformers."""

MULTI_VECTOR = "MultiVectorEncoder"
"""`model_type` in PROMPTS_FILE of models that keep the vectors of all tokens."""


def choose_vector_settings(config: Config, longest: int) -> VectorSettings:
    """As a run with this config makes vectors of texts; `longest` is what its model can read, in tokens."""
    vectors = choose_objective(config).vectors
    return VectorSettings(max_length=longest) if vectors is None else vectors(config)


def load_vector_settings(weights: EncoderWeights) -> VectorSettings:
    """As the model was fine-tuned; else the mean over texts of any length that it can read.

    Raises:
        WeightsError: an exported folder pools texts in a way that is none of ours, or its files are damaged.
    """
    longest, file = weights.config.max_position_embeddings, weights.folder / "config.yaml"
    if weights.layout == "checkpoint" and file.is_file():
        return choose_vector_settings(load_saved_config(file), longest)
    # An exported folder stays what it is when it is exported again.
    several = _read(weights.folder / PROMPTS_FILE).get("model_type") == MULTI_VECTOR
    if several or (weights.folder / POOLING_FILE).is_file():
        return _read_settings(weights.folder, longest)
    return VectorSettings(max_length=longest)


def _read_settings(folder: Path, longest: int) -> VectorSettings:
    """From files as our export writes them, or as sentence-transformers 6 saves them: its length is the tokenizer's."""
    modes, ours, prompts, tokenizer = (_read(folder / x) for x in (POOLING_FILE, LENGTH_FILE, PROMPTS_FILE, _TOKENIZER))
    pooling = [name for name, key in POOLING_KEYS.items() if modes.get(key) or modes.get("pooling_mode") == name]
    if prompts.get("model_type") == MULTI_VECTOR:
        pooling = [TOKENS]
    if len(pooling) != 1:
        raise WeightsError(
            f"{folder / POOLING_FILE}: the pooling must be one of {', '.join(POOLING_KEYS)}; set it to that"
        )
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
        raise WeightsError(f"{file} cannot be read ({error}); correct it") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file} is no JSON object; correct it")
    return content
