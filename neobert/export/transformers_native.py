"""The native form: config.json and tensors of EuroBERT, which transformers loads without any code of ours."""

from typing import Any

from torch import Tensor

from neobert.data.tokenizer import Tokenizer
from neobert.model.config import ModelConfig
from neobert.weights.layouts import LAYOUTS, from_ours


def native_config(config: ModelConfig, tokenizer: Tokenizer, dtype: str, *, fills_masks: bool = True) -> dict[str, Any]:
    """The contents of config.json; `dtype` is torch's name of the dtype of the weights."""
    return {
        "architectures": ["EuroBertForMaskedLM" if fills_masks else "EuroBertModel"],
        "model_type": "eurobert",
        "dtype": dtype,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": False,
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.cls_id,
        "eos_token_id": tokenizer.sep_id,
        "mask_token_id": tokenizer.mask_id,
        "classifier_pooling": "mean",
    }


def native_tensors(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under EuroBERT's names."""
    return from_ours(LAYOUTS["eurobert"], config, tensors)
