"""EuroBERT: our default architecture under other names, and what it is exported as."""

from functools import partial
from typing import Any

from neobert.weights.layouts.conversion import Layout
from neobert.weights.layouts.llama import DECODER_IDS, block_config, block_rules, describe_blocks, repeat_grouped_heads

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 128001,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
    "rope_theta": 10000.0,
}
"""What transformers leaves out of a config.json because it is the default of its class."""

describe_eurobert = partial(describe_blocks, title="EuroBERT", defaults=_DEFAULTS)
"""The `config.json` of a EuroBERT model of transformers."""

EUROBERT = Layout(
    name="eurobert",
    describe=describe_eurobert,
    rules=block_rules,
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    prefix="model.",
    prepare=repeat_grouped_heads,
    title="EuroBERT",
    classes="EuroBert",
    token_ids={**DECODER_IDS, "mask_token_id": "mask"},
    to_config=block_config,
    requires={
        "rope": True,
        "rms_norm": True,
        "hidden_act": "swiglu",
        "local_attention": None,
        "local_rope_theta": None,
        "qk_norm": False,
        "embedding_norm": False,
        "first_attention_norm": True,
        "prediction_head": False,
        "decoder_bias": False,
        "ngpt": False,
        "hub_config": None,
    },
)
