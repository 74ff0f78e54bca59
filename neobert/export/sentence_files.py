"""The files that make `SentenceTransformer(folder)` work: the encoder, then the mean over the tokens of a text.

The names of the modules are the short ones that every version of sentence-transformers reads, and text-embeddings-
inference takes the pooling from the same files.
"""

import json
from pathlib import Path

from neobert.model.config import ModelConfig


def write_sentence_files(output: Path, config: ModelConfig) -> None:
    """Writes modules.json, sentence_bert_config.json and 1_Pooling/config.json."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    pooling = {
        "word_embedding_dimension": config.hidden_size,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    (output / "1_Pooling").mkdir()
    (output / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=2) + "\n")
    (output / "modules.json").write_text(json.dumps(modules, indent=2) + "\n")
    transformer = {"max_seq_length": config.max_position_embeddings, "do_lower_case": False}
    (output / "sentence_bert_config.json").write_text(json.dumps(transformer, indent=2) + "\n")
