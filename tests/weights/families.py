"""A tiny random model of each family, made by transformers or as the family's published code does."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    EuroBertConfig,
    EuroBertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB, LONGEST = 384, 64
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 64,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
# Without a mask of its own, a decoder is the encoder that its weights become.
_BOTH_SIDES = {**_COMMON, "is_causal": False}

FAMILIES: dict[str, Callable[[], Any]] = {
    "eurobert": lambda: EuroBertForMaskedLM(EuroBertConfig(**_COMMON, rope_theta=250000.0)),
    "eurobert, grouped keys": lambda: EuroBertForMaskedLM(EuroBertConfig(**_COMMON, num_key_value_heads=2)),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**_COMMON, local_attention=8, global_attn_every_n_layers=2, cls_token_id=2, sep_token_id=3)
    ),
    "modernbert, untied, one base, no windows": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**_COMMON, layer_types=["full_attention"] * 3, tie_word_embeddings=False, decoder_bias=False)
    ),
    "llama, grouped keys": lambda: LlamaForCausalLM(
        LlamaConfig(**_BOTH_SIDES, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "llama, untied": lambda: LlamaForCausalLM(LlamaConfig(**_BOTH_SIDES, rms_norm_eps=1e-5)),
    "qwen3, grouped keys": lambda: Qwen3ForCausalLM(Qwen3Config(**_BOTH_SIDES, num_key_value_heads=3, head_dim=8)),
}


def build_family(name: str) -> Any:
    """The model with weights in which no norm and no bias does nothing."""
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
    return model
