"""Encoders with the way they make vectors of texts, for evaluation: ours, packed; others by sentence-transformers.

Pooling, length and prefixes are those of the checkpoint or the exported folder. Others are what `SentenceTransformer`
makes of a folder or a hub name: its own modules and prompts, or mean pooling over a plain transformers encoder.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from neobert.errors import DataError
from neobert.inference.model import Model, build_loaded, choose_device, choose_dtype
from neobert.inference.packed import BATCH_TOKENS
from neobert.model.pooling import POOLING
from neobert.objectives.base import VectorSettings
from neobert.objectives.late_interaction import TOKENS, TokenVectors
from neobert.weights.encoder_weights import find_weights, is_of_transformers, load_encoder_weights
from neobert.weights.vector_settings import load_vector_settings

Vectors = NDArray[np.float32] | TokenVectors
"""`[texts, H]`, not scaled to length 1; or those of all tokens, on the host, which are."""


class TextEncoder(Protocol):
    """An encoder with the way it makes vectors of texts."""

    @property
    def settings(self) -> VectorSettings: ...

    def embed(self, texts: Sequence[str], *, prefix: str = "") -> Vectors:
        """A vector a text, with `prefix` before each."""

    def digest(self) -> str:
        """Equal digests give equal vectors."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OwnEncoder:
    """A model of ours."""

    model: Model
    settings: VectorSettings

    def embed(self, texts: Sequence[str], *, prefix: str = "") -> Vectors:
        cls_id, sep_id = self.model.tokenizer.cls_id, self.model.tokenizer.sep_id
        limit = self.settings.max_length - 2
        tokens = self.model.tokenizer.encode_batch([prefix + text for text in texts])
        documents = [np.array([cls_id, *ids[:limit], sep_id], dtype=np.int32) for ids in tokens]
        if self.settings.pooling == TOKENS:
            none = torch.empty(0, self.model.hidden_size)
            states = torch.cat([none, *self.model.token_states(documents)])
            lengths = torch.tensor([len(document) for document in documents], dtype=torch.int64)
            return TokenVectors(torch.nn.functional.normalize(states, dim=1), lengths)
        vectors = self.model.embed_tokens(
            documents, pooling=self.settings.pooling, normalize=False, batch_tokens=BATCH_TOKENS
        )
        return vectors.numpy()

    def digest(self) -> str:
        products = self.model.module.encoder.block_weight.dtype
        return _digest(self.model.digest(), str(products), repr(self.settings))


class SentenceEncoder:
    """A model of others, by sentence-transformers.

    Raises:
        DataError: the library is not installed, or cannot load the model.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise DataError(
                f"{folder} is no encoder of ours, and models of others are evaluated with sentence-transformers; "
                "install it with pip install -e '.[eval]'"
            ) from error
        try:
            self._model: Any = SentenceTransformer(str(folder), device=str(device), model_kwargs={"dtype": dtype})
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"{folder} is no encoder of ours, and sentence-transformers cannot load it ({reason.rstrip('.')})"
            ) from error
        self._model.default_prompt_name = None  # It would come before texts that are to have no prefix.
        known = self._model.prompts
        document = next((known[name] for name in ("document", "passage", "corpus") if known.get(name)), None)
        prompts = tuple((name, text) for name, text in {**known, "document": document}.items() if text)
        self.settings = VectorSettings(
            max_length=self._model.max_seq_length or self._model.tokenizer.model_max_length,
            pooling=_THEIRS,
            prompts=prompts,
        )

    def cut_at(self, max_length: int) -> None:
        """Cuts longer texts there, in tokens."""
        self._model.max_seq_length = max_length
        self.settings = replace(self.settings, max_length=max_length)

    def embed(self, texts: Sequence[str], *, prefix: str = "") -> Vectors:
        vectors: NDArray[np.float32] = self._model.encode(list(texts), prompt=prefix or None, show_progress_bar=False)
        return vectors.astype(np.float32, copy=False)

    def digest(self) -> str:
        digest = hashlib.sha256(self._model.tokenizer.backend_tokenizer.to_str().encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(f"\0{name}\0{tensor.dtype}\0".encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
        return _digest(digest.hexdigest(), str(self._model), repr(self.settings))


_THEIRS = "of its modules"
"""The pooling of a model of others, which only its library knows."""


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load_text_encoder(
    path: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    weights: str = "model",
    pooling: str | None = None,
    max_length: int | None = None,
) -> TextEncoder:
    """The encoder at `path`; `device`, `dtype` and `weights` are as in `neobert.load`.

    Args:
        pooling: instead of the checkpoint's.
        max_length: cut texts at so many tokens, [CLS] and [SEP] included, instead of the checkpoint's number.

    Raises:
        WeightsError: there is no model at `path`.
        DataError: `pooling` or `max_length` cannot be used, or the model is of others and cannot be loaded.
    """
    check_max_length(max_length)
    if pooling not in (None, TOKENS, *POOLING):
        raise DataError(f"--pooling: {pooling!r} is unknown; write one of {', '.join([*POOLING, TOKENS])}")
    chosen = choose_device(device)
    if weights == "model" and is_of_transformers(find_weights(path)):
        if pooling is not None:
            raise DataError(f"--pooling: {path} is no encoder of ours and pools as its own modules do; remove it")
        # There all weights would be bf16, norms and the residual stream too: only where it is asked for.
        products = choose_dtype("fp32" if dtype == "auto" else dtype, chosen)
        encoder = SentenceEncoder(find_weights(path), device=chosen, dtype=products)
        if max_length is not None:
            encoder.cut_at(min(max_length, encoder.settings.max_length))
        return encoder
    found = load_encoder_weights(path, weights=weights)
    model = build_loaded(found, chosen, choose_dtype(dtype, chosen))
    settings = load_vector_settings(found)
    longest = settings.max_length if max_length is None else max_length
    settings = replace(settings, pooling=pooling or settings.pooling, max_length=min(longest, model.max_length))
    return OwnEncoder(model=model, settings=settings)


def check_max_length(value: int | None) -> None:
    """Raises DataError for a `--max-length` that leaves no token of a text."""
    if value is not None and value < 3:
        raise DataError(f"--max-length: {value}; write 3 or more, [CLS] and [SEP] included")
