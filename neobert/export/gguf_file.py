"""GGUF: weights, tokenizer and settings in one file, for llama.cpp and what is built on it.

llama.cpp has the architecture `eurobert`, which is our native form without the vocabulary projection. Of tokenizers it
rebuilds two kinds that we train: byte-level BPE as GPT-2 cuts text, and WordPiece as BERT does. Every other one is
refused, since it would give other ids. Queries and keys need no reordering: `eurobert` rotates halves, as we do.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neobert.data.tokenizer import Tokenizer
from neobert.model.config import ModelConfig
from neobert.objectives.base import VectorSettings
from neobert.weights.encoder_weights import EncoderWeights

GGUF_PACKAGES = ("gguf",)
GGUF_FOLDER = "gguf"
GGUF_FILES = {name: f"{GGUF_FOLDER}/model-{name}.gguf" for name in ("f32", "f16", "q8_0")}
"""How matrices are stored -> file below the exported folder. Vectors stay fp32."""

_POOLING = {"mean": "MEAN", "cls": "CLS"}
"""Ours -> llama.cpp's; others give the vectors of all tokens."""

_BLOCK = {
    "attention_norm": ("attn_norm",),
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "out": ("attn_output",),
    "ffn_norm": ("ffn_norm",),
    "gate_up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
}
"""Our tensor of a block -> those of GGUF, of which it is the rows one after the other."""


def gguf_tensors(weights: EncoderWeights) -> dict[str, Tensor]:
    """The encoder's tensors by GGUF's names."""
    tensors = {
        "token_embd.weight": weights.tensors["encoder.embedding.weight"],
        "output_norm.weight": weights.tensors["encoder.norm.weight"],
    }
    for number in range(weights.config.num_hidden_layers):
        for ours, theirs in _BLOCK.items():
            whole = weights.tensors[f"encoder.layers.{number}.{ours}.weight"]
            tensors |= {f"blk.{number}.{x}.weight": part for x, part in zip(theirs, whole.chunk(len(theirs)))}
    return tensors


def tokenizer_problem(tokenizer: Tokenizer) -> str | None:
    """Why llama.cpp would tokenise otherwise; None where it does not."""
    definition = tokenizer.definition
    model, normalizer, cuts = (definition[part] or {} for part in ("model", "normalizer", "pre_tokenizer"))
    if model.get("type") == "BPE":
        expected: dict[str, Any] = {
            "normalizer": (normalizer.get("type"), None),
            "pre_tokenizer": (cuts.get("type"), "ByteLevel"),
            "add_prefix_space": (cuts.get("add_prefix_space"), False),
            "use_regex": (cuts.get("use_regex", True), True),
            "ignore_merges": (model.get("ignore_merges", False), False),
        }
    elif model.get("type") == "WordPiece":
        lowercase = normalizer.get("lowercase")
        strips = normalizer.get("strip_accents")
        expected = {
            "normalizer": (normalizer.get("type"), "BertNormalizer"),
            "clean_text": (normalizer.get("clean_text"), True),
            "handle_chinese_chars": (normalizer.get("handle_chinese_chars"), True),
            "strip_accents": (lowercase if strips is None else strips, lowercase),
            "pre_tokenizer": (cuts.get("type"), "BertPreTokenizer"),
            "continuing_subword_prefix": (model.get("continuing_subword_prefix"), "##"),
        }
    else:
        return f"its tokenizer is {model.get('type')}, and GGUF takes byte-level BPE or WordPiece"
    wrong = [f"{name} is {found!r} instead of {wanted!r}" for name, (found, wanted) in expected.items()]
    wrong = [text for text, (found, wanted) in zip(wrong, expected.values()) if found != wanted]
    return f"llama.cpp would tokenise otherwise: {', '.join(wrong)} in tokenizer.json" if wrong else None


def write_gguf(folder: Path, weights: EncoderWeights, tokenizer: Tokenizer, sentences: VectorSettings) -> None:
    """Writes GGUF_FILES below `folder`."""
    (folder / GGUF_FOLDER).mkdir()
    for kind, path in GGUF_FILES.items():
        _write_file(folder / path, kind, weights, tokenizer, sentences)


def _write_file(
    path: Path, kind: str, weights: EncoderWeights, tokenizer: Tokenizer, sentences: VectorSettings
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "eurobert")
    _add_settings(writer, weights.config, sentences)
    _add_tokenizer(writer, tokenizer)
    files = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[files[kind]])
    if kind == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in gguf_tensors(weights).items():
        stored = gguf.GGMLQuantizationType[_choose_type(tensor, kind)]
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _choose_type(tensor: Tensor, kind: str) -> str:
    if tensor.ndim == 1:
        return "F32"
    # Q8_0 has a scale for every 32 numbers of a row.
    return "F16" if kind == "q8_0" and tensor.shape[1] % 32 else kind.upper()


def _add_settings(writer: Any, config: ModelConfig, sentences: VectorSettings) -> None:
    import gguf

    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType[_POOLING.get(sentences.pooling, "NONE")])


def _add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    is_bpe = tokenizer.model_name == "BPE"
    writer.add_tokenizer_model("gpt2" if is_bpe else "bert")
    writer.add_tokenizer_pre("gpt-2" if is_bpe else "default")
    tokens = list(_list_tokens(tokenizer))
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    if is_bpe:
        merges = tokenizer.definition["model"]["merges"]
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    else:
        writer.add_token_type_count(1)
        writer.add_bool("tokenizer.ggml.normalizer.lowercase", bool(tokenizer.definition["normalizer"]["lowercase"]))
    writer.add_bos_token_id(tokenizer.cls_id)
    writer.add_eos_token_id(tokenizer.sep_id)
    writer.add_sep_token_id(tokenizer.sep_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_mask_token_id(tokenizer.mask_id)
    if tokenizer.unk_id is not None:
        writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(is_bpe)
    writer.add_add_sep_token(not is_bpe)


def _list_tokens(tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    """Text and kind of every id. llama.cpp marks the start of a word in WordPiece, not its continuation."""
    import gguf

    kinds, names = gguf.TokenType, {number: text for text, number in tokenizer.vocabulary.items()}
    added = {token["id"] for token in tokenizer.definition["added_tokens"]}
    for number in range(tokenizer.size):
        text = names.get(number)
        if text is None:
            yield f"[unused id {number}]", kinds.UNUSED
        elif number == tokenizer.unk_id:
            yield text, kinds.UNKNOWN
        elif number in tokenizer.special_ids:
            yield text, kinds.CONTROL
        elif number in added:
            yield text, kinds.USER_DEFINED
        elif tokenizer.model_name == "BPE":
            yield text, kinds.NORMAL
        else:
            yield text.removeprefix("##") if text.startswith("##") else f"\u2581{text}", kinds.NORMAL


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a GGUF file in fp32, by its names."""
    import gguf

    reader = gguf.GGUFReader(path)
    return {x.name: torch.from_numpy(gguf.quants.dequantize(x.data, x.tensor_type).copy()) for x in reader.tensors}
