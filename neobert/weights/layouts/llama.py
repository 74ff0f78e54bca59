"""Decoders with the blocks of Llama: Llama, SmolLM2, Qwen 3; and what EuroBERT has in common with them.

A decoder reads what is before a token; here its weights become an encoder that reads both sides. What comes out is
nothing that the decoder computed, but a start that further training makes use of (arXiv 2507.00994). Without a causal
mask the two are the same function, which `to_config` asks transformers for with `is_causal: false`.

Blocks are ours: RMSNorm before each half, rotary positions rotating halves, SwiGLU. Queries, keys and values are apart,
and so are gate and up. Where several query heads share one head of keys and values, that head is repeated.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from neobert.model.config import ModelConfig
from neobert.weights.describe import WeightsError, build_config, check_expected
from neobert.weights.layouts.conversion import Layout, Rule, Tensors

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
}
"""What transformers leaves out of a config.json because it is the default of its class: of Llama."""

_QWEN_DEFAULTS = {
    **_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "head_dim": 128,
}


def describe_blocks(
    config: Mapping[str, Any], tensors: Tensors, *, title: str, defaults: Mapping[str, Any], qk_norm: bool = False
) -> ModelConfig:
    """The `config.json` of a model of transformers with these blocks."""
    c = {name: config.get(name, default) for name, default in defaults.items()}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    expected: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "hidden_act": (c["hidden_act"], ("silu",)),
        "attention_bias": (c["attention_bias"], (False,)),
        "mlp_bias": (c["mlp_bias"], (False,)),
        "num_key_value_heads": (groups, (None, *(n for n in range(1, heads + 1) if heads % n == 0))),
        "head_dim": (c["head_dim"], (None, c["hidden_size"] // heads)),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), ("default",)),
        "intermediate_size modulo 8": (c["intermediate_size"] % 8, (0,)),
        "use_sliding_window": (c.get("use_sliding_window", False), (False,)),
    }
    check_expected(title, expected)
    return build_config(
        hidden_size=c["hidden_size"],
        num_hidden_layers=c["num_hidden_layers"],
        num_attention_heads=heads,
        intermediate_size=c["intermediate_size"] * 3 // 2,
        max_position_embeddings=c["max_position_embeddings"],
        vocab_size=c["vocab_size"],
        pad_token_id=max(0, c["pad_token_id"] or 0),
        rope_theta=float(rope.get("rope_theta", c["rope_theta"])),
        norm_eps=float(c["rms_norm_eps"]),
        tie_word_embeddings=bool(c["tie_word_embeddings"]),
        qk_norm=qk_norm,
    )


def repeat_grouped_heads(config: Mapping[str, Any], described: ModelConfig, tensors: Tensors) -> tuple[Tensors, str]:
    """Heads of keys and values as often as the heads of queries that share them, and a sentence where that changed
    anything.

    Raises:
        WeightsError: a tensor has not the rows that the config says.
    """
    groups, heads = config.get("num_key_value_heads"), described.num_attention_heads
    if groups in (None, heads):
        return tensors, ""
    repeated = {
        name: _repeat(name, tensor, groups, described) if name.endswith(_GROUPED) else tensor
        for name, tensor in tensors.items()
    }
    return repeated, f"its {groups} heads of keys and values are repeated for {heads} heads of queries"


_GROUPED = (".self_attn.k_proj.weight", ".self_attn.v_proj.weight")


def _repeat(name: str, tensor: Tensor, groups: int, described: ModelConfig) -> Tensor:
    shape = (groups * described.head_dim, described.hidden_size)
    if tensor.shape != shape:
        raise WeightsError(f"{name} has shape {list(tensor.shape)} instead of {list(shape)}")
    apart = tensor.view(groups, described.head_dim, described.hidden_size)
    return apart.repeat_interleave(described.num_attention_heads // groups, dim=0).flatten(0, 1)


def block_rules(config: ModelConfig) -> Iterator[Rule]:
    """The rules of such a model."""
    yield Rule(ours="encoder.embedding.weight", theirs=("model.embed_tokens.weight",))
    yield Rule(ours="encoder.norm.weight", theirs=("model.norm.weight",))
    names = {**_BLOCK, **(_QK_NORM if config.qk_norm else {})}
    for number in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            parts = tuple(f"model.layers.{number}.{part}.weight" for part in theirs)
            yield Rule(ours=f"encoder.layers.{number}.{ours}.weight", theirs=parts)
    if not config.tie_word_embeddings:
        yield Rule(ours="decoder.weight", theirs=("lm_head.weight",))


_BLOCK = {
    "attention_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "ffn_norm": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_QK_NORM = {"q_norm": ("self_attn.q_norm",), "k_norm": ("self_attn.k_norm",)}


def block_config(config: ModelConfig) -> dict[str, Any]:
    """What `describe_blocks` reads, of an encoder of ours."""
    return {
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
    }


DECODER_IDS = {"pad_token_id": "pad", "bos_token_id": "cls", "eos_token_id": "sep"}


def _layout(name: str, *, title: str, defaults: Mapping[str, Any], qk_norm: bool) -> Layout:
    return Layout(
        name=name,
        describe=partial(describe_blocks, title=title, defaults=defaults, qk_norm=qk_norm),
        rules=block_rules,
        embedding="model.embed_tokens.weight",
        head="lm_head.weight",
        prefix="model.",
        prepare=repeat_grouped_heads,
        is_causal=True,
        title=title,
        classes=title.replace(" ", ""),
        token_ids=DECODER_IDS,
        to_config=lambda config: {**block_config(config), "is_causal": False},
    )


LLAMA = _layout("llama", title="Llama", defaults=_DEFAULTS, qk_norm=False)
QWEN3 = _layout("qwen3", title="Qwen 3", defaults=_QWEN_DEFAULTS, qk_norm=True)
