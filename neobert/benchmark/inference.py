"""Inference on texts of mixed lengths: our packed forward pass against the same weights in transformers, padded.

The architecture is the one that transformers calls EuroBERT, so the weights are handed over in memory. Padded batches
have a fixed number of texts, in the order given, as a data loader makes them; and again sorted by length, which is
the best that padding can do. All three are measured in turn within one process, real tokens count, tokenising does not,
and the hidden states of all are compared before anything is timed.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import EuroBertConfig, EuroBertModel

from neobert.data.rows.lanes import IntArray
from neobert.inference.model import Model
from neobert.inference.packed import hidden_states, plan_batches

_PROJECTIONS = {"out": "self_attn.o_proj", "down": "mlp.down_proj"}
_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
}


def build_padded(model: Model) -> EuroBertModel:
    """The same encoder as a class of transformers.

    Raises:
        ValueError: the architecture has learned positions, LayerNorm or GELU, which that class lacks.
    """
    config = model.module.encoder.config
    if not (config.rope and config.rms_norm and config.hidden_act == "swiglu"):
        raise ValueError("transformers has no class for this architecture; use a model with rope, rms_norm and swiglu")
    described = EuroBertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.ffn_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        pad_token_id=model.tokenizer.pad_id,
        bos_token_id=model.tokenizer.cls_id,
        eos_token_id=model.tokenizer.sep_id,
        mask_token_id=model.tokenizer.mask_id,
    )
    theirs = EuroBertModel(described)
    weights = model.module.encoder.state_dict()
    renamed = {"embed_tokens.weight": weights["embedding.weight"], "norm.weight": weights["norm.weight"]}
    for number in range(config.num_hidden_layers):
        for ours, name in {**_PROJECTIONS, **_NORMS}.items():
            renamed[f"layers.{number}.{name}.weight"] = weights[f"layers.{number}.{ours}.weight"]
        for ours, names in _FUSED.items():
            parts = weights[f"layers.{number}.{ours}.weight"].chunk(len(names))
            renamed |= {f"layers.{number}.{name}.weight": part for name, part in zip(names, parts)}
    theirs.load_state_dict(renamed, strict=True)
    return theirs.to(model.module.head_weight.device).eval()  # type: ignore[arg-type]


def run_packed(model: Model, documents: Sequence[IntArray], batch_tokens: int) -> list[Tensor]:
    """Hidden states of every document, from unpadded batches."""
    found: dict[int, Tensor] = {}
    for batch in plan_batches([len(tokens) for tokens in documents], batch_tokens):
        chosen = [documents[item] for item in batch]
        found |= zip(batch, hidden_states(model.module, chosen).split([len(tokens) for tokens in chosen]))
    return [found[item] for item in range(len(documents))]


@torch.inference_mode()
def run_padded(theirs: EuroBertModel, documents: Sequence[IntArray], rows: int, pad_id: int) -> list[Tensor]:
    """Hidden states of every document, from padded batches of `rows` documents in the order given."""
    found: list[Tensor] = []
    for first in range(0, len(documents), rows):
        chosen = documents[first : first + rows]
        input_ids = np.full((len(chosen), max(map(len, chosen))), pad_id, dtype=np.int64)
        for row, tokens in enumerate(chosen):
            input_ids[row, : len(tokens)] = tokens
        mask = np.arange(input_ids.shape[1]) < np.array([len(tokens) for tokens in chosen])[:, None]
        ids, attention_mask = (torch.from_numpy(x).to(theirs.device) for x in (input_ids, mask.astype(np.int64)))
        hidden = theirs(input_ids=ids, attention_mask=attention_mask).last_hidden_state
        found += [states[: len(tokens)] for states, tokens in zip(hidden, chosen)]
    return found


def compare(model: Model, texts: Sequence[str], *, batch_tokens: int, rows: int, repeats: int) -> list[str]:
    """Lines with tokens per second of the three ways, medians over `repeats`, and the ratios of ours to the others."""
    documents, _ = model.encode(texts)
    theirs, pad_id = build_padded(model), model.tokenizer.pad_id
    by_length = sorted(documents, key=len)
    ways: dict[str, Callable[[], list[Tensor]]] = {
        "packed": lambda: run_packed(model, documents, batch_tokens),
        "transformers, padded": lambda: run_padded(theirs, documents, rows, pad_id),
        "transformers, padded, sorted by length": lambda: run_padded(theirs, by_length, rows, pad_id),
    }
    pairs = zip(ways["packed"](), ways["transformers, padded"]())
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    num_tokens = sum(map(len, documents))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    speeds = {name: num_tokens / statistics.median(times) for name, times in seconds.items()}
    lengths = np.array([len(tokens) for tokens in documents])
    lines = [
        f"{len(documents):,} texts of {lengths.min()} to {lengths.max()} tokens (median {int(np.median(lengths))}), "
        f"{num_tokens:,} tokens; largest difference of hidden states {difference:.1e}"
    ]
    for name, speed in speeds.items():
        ratio = "" if name == "packed" else f", packed is {speeds['packed'] / speed:.2f} times as fast"
        lines.append(f"{name}: {speed:,.0f} tokens/s{ratio}")
    return lines
