"""ONNX: the graph of a native folder in fp32, and the same with matrices in int8 (dynamic quantisation).

| the model was trained | outputs |
|---|---|
| to fill masks | `logits` `[batch, length, V]` |
| on labels | `logits` `[batch, C]`, or `[batch, length, C]` of token classification |
| for vectors, or replaced tokens | `last_hidden_state` `[batch, length, H]`, `sentence_embedding` `[batch, H]` |
| for the vectors of all tokens | `last_hidden_state` and `token_embeddings` `[batch, length, H]`, of length 1 |

Batch and length are dynamic. Padding is where `attention_mask` is 0.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from neobert.export.heads import choose_class
from neobert.objectives.base import VectorSettings
from neobert.objectives.classification import HeadInfo
from neobert.objectives.late_interaction import TOKENS

ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
ONNX_FOLDER = "onnx"
ONNX_FILE, INT8_FILE = f"{ONNX_FOLDER}/model.onnx", f"{ONNX_FOLDER}/model_quantized.onnx"
"""Names under which transformers.js and others look for them."""

_LARGEST_FILE = 1 << 30
"""Bytes of weights that fit into one file beside the graph; more go to a second file."""


class _Graph(nn.Module):
    """A model of transformers with the outputs of the file."""

    def __init__(self, model: nn.Module, pooling: str | None) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        if self.pooling is None:
            return output.logits
        states = output.last_hidden_state
        return states, pool_padded(states, attention_mask, self.pooling)


def pool_padded(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """`[B, H]` of hidden states `[B, S, H]` with padding on the right, or `[B, S, H]` for `tokens`."""
    if pooling == TOKENS:
        return nn.functional.normalize(states, dim=-1)
    if pooling == "cls":
        return states[:, 0]
    real = mask[..., None].to(states.dtype)
    if pooling == "max":
        return torch.where(real > 0, states, torch.finfo(states.dtype).min).amax(1)
    return (states * real).sum(1) / real.sum(1)


def write_onnx(folder: Path, sentences: VectorSettings, head: HeadInfo | None, *, fills_masks: bool) -> None:
    """Writes both files below a native folder, from what is in that."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    has_logits = head is not None or fills_masks
    auto: Any = getattr(transformers, f"AutoModelFor{choose_class(head)}" if has_logits else "AutoModel")
    model = auto.from_pretrained(str(folder), dtype=torch.float32).eval()
    names = ["logits"]
    if not has_logits:
        names = ["last_hidden_state", "token_embeddings" if sentences.pooling == TOKENS else "sentence_embedding"]
    (folder / ONNX_FOLDER).mkdir()
    size = sum(x.numel() * x.element_size() for x in model.parameters())
    with _quiet():
        _export(_Graph(model, None if has_logits else sentences.pooling), names, folder / ONNX_FILE, size)
        quantize_dynamic(
            folder / ONNX_FILE,
            folder / INT8_FILE,
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=size > _LARGEST_FILE,
        )


def _export(graph: nn.Module, names: list[str], path: Path, size: int) -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    ids = torch.zeros(2, 8, dtype=torch.int64)
    with torch.no_grad():
        torch.onnx.export(
            graph.eval(),
            (ids, torch.ones_like(ids)),
            path,
            input_names=["input_ids", "attention_mask"],
            output_names=names,
            dynamic_shapes={name: {0: batch, 1: length} for name in ("input_ids", "attention_mask")},
            dynamo=True,
            verbose=False,
            external_data=size > _LARGEST_FILE,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages and axes: the files are compared with our model."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
