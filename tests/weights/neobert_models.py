"""Models in the layouts of NeoBERT and its fork, and their forward pass written out, independent of our code.

Queries, keys and values are fused head by head; rotary planes are neighbouring coordinates, rotated as complex numbers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "vocab_size": 30}
FFN = 32  # 2/3 of 40 is 26.7, rounded up to a multiple of 8.
LONGEST = 16


def make_tensors(
    kind: str, *, seed: int = 0, gelu: bool = False, learned: bool = False, biased: bool = False
) -> dict[str, Tensor]:
    """Random weights under the names of `hub` (packed w12, a biased projection of its own) or `fork`."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    hidden, vocab = SIZES["hidden_size"], SIZES["vocab_size"]
    tensors = {"model.encoder.weight": random(vocab, hidden), "model.layer_norm.weight": 1 + random(hidden)}
    if learned:
        tensors["model.positional_embedding.weight"] = random(LONGEST + 1, hidden)
        tensors["model.positional_embedding.weight"][0] = 0
    for number in range(SIZES["num_hidden_layers"]):
        block = f"model.transformer_encoder.{number}"
        tensors |= {
            f"{block}.qkv.weight": random(3 * hidden, hidden),
            f"{block}.wo.weight": random(hidden, hidden),
            f"{block}.attention_norm.weight": 1 + random(hidden),
            f"{block}.ffn_norm.weight": 1 + random(hidden),
        }
        if gelu:
            tensors |= {f"{block}.ffn.0.weight": random(40, hidden), f"{block}.ffn.2.weight": random(hidden, 40)}
        elif kind == "hub":
            tensors[f"{block}.ffn.w12.weight"] = random(2 * FFN, hidden)
            tensors[f"{block}.ffn.w3.weight"] = random(hidden, FFN)
        else:
            tensors[f"{block}.ffn.w1.weight"] = random(FFN, hidden)
            tensors[f"{block}.ffn.w2.weight"] = random(FFN, hidden)
            tensors[f"{block}.ffn.w3.weight"] = random(hidden, FFN)
    tensors["decoder.weight"] = random(vocab, hidden)
    if kind == "hub":
        tensors["decoder.bias"] = random(vocab) if biased else torch.zeros(vocab)
    return tensors


def forward(tensors: dict[str, Tensor], ids: list[int], *, rms_norm: bool = True) -> Tensor:
    """Logits `[n, V]` of one document."""
    hidden, heads = SIZES["hidden_size"], SIZES["num_attention_heads"]
    width, count = hidden // heads, len(ids)

    def norm(x: Tensor, name: str) -> Tensor:
        weight = tensors[f"{name}.weight"]
        if rms_norm:
            return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
        return F.layer_norm(x, (hidden,), weight, None, 1e-5)

    frequencies = 10000.0 ** (-torch.arange(0, width, 2)[: width // 2].float() / width)
    turns = torch.polar(torch.ones(count, width // 2), torch.outer(torch.arange(count).float(), frequencies))

    def rotate(x: Tensor) -> Tensor:
        planes = torch.view_as_complex(x.reshape(count, heads, width // 2, 2))
        return torch.view_as_real(planes * turns[:, None]).reshape(count, heads, width)

    x = tensors["model.encoder.weight"][torch.tensor(ids)]
    learned = tensors.get("model.positional_embedding.weight")
    if learned is not None:
        x = x + learned[1 : count + 1]
    for number in range(SIZES["num_hidden_layers"]):
        block = f"model.transformer_encoder.{number}"
        qkv = norm(x, f"{block}.attention_norm") @ tensors[f"{block}.qkv.weight"].T
        q, k, v = qkv.view(count, heads, 3 * width).chunk(3, dim=-1)
        if learned is None:
            q, k = rotate(q), rotate(k)
        scores = torch.einsum("qnd,knd->nqk", q, k) / width**0.5
        attended = torch.einsum("nqk,knd->qnd", scores.softmax(-1), v).reshape(count, hidden)
        x = x + attended @ tensors[f"{block}.wo.weight"].T
        y = norm(x, f"{block}.ffn_norm")
        if f"{block}.ffn.0.weight" in tensors:
            y = F.gelu(y @ tensors[f"{block}.ffn.0.weight"].T) @ tensors[f"{block}.ffn.2.weight"].T
        else:
            if f"{block}.ffn.w12.weight" in tensors:
                gate, up = (y @ tensors[f"{block}.ffn.w12.weight"].T).chunk(2, dim=-1)
            else:
                gate, up = y @ tensors[f"{block}.ffn.w1.weight"].T, y @ tensors[f"{block}.ffn.w2.weight"].T
            y = (F.silu(gate) * up) @ tensors[f"{block}.ffn.w3.weight"].T
        x = x + y
    return norm(x, "model.layer_norm") @ tensors["decoder.weight"].T + tensors.get("decoder.bias", 0)


def hub_config(**more: Any) -> dict[str, Any]:
    """A config.json like the published one."""
    return {
        "model_type": "neobert",
        "architectures": ["NeoBERTLMHead"],
        "dim_head": SIZES["hidden_size"] // SIZES["num_attention_heads"],
        "max_length": LONGEST,
        "norm_eps": 1e-5,
        "pad_token_id": 0,
        "embedding_init_range": 0.02,
        "decoder_init_range": 0.02,
        "torch_dtype": "float32",
        **SIZES,
        **more,
    }
