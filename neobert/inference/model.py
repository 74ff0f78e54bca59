"""A trained encoder with its tokenizer, texts in, numbers out, loaded from a checkpoint, or the newest one of a run.

    model = neobert.load("outputs/quickstart")
    vectors = model.embed(["one text", "another text"])             # [2, H]
    per_token = model.hidden_states(["one text", "another text"])   # a list of [tokens, H]

A text becomes `[CLS] text [SEP]`. Texts longer than the model are cut at its length, and a warning says how many were.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from neobert.config.schema import TokenizerSection
from neobert.data.rows.lanes import IntArray
from neobert.data.tokenizer import Tokenizer, load_tokenizer
from neobert.errors import DataError
from neobert.inference.fill_mask import FilledText, fill_mask
from neobert.inference.packed import BATCH_TOKENS, hidden_states, plan_batches
from neobert.model.attention import choose_attention
from neobert.model.hub_encoder import build_encoder_of
from neobert.model.pooling import choose_pooling
from neobert.objectives.base import Answer, Answers, Objective, ObjectiveModule
from neobert.objectives.table import OBJECTIVES, load_part
from neobert.secrets import build_logger
from neobert.weights.describe import WeightsError
from neobert.weights.encoder_weights import EncoderWeights, load_encoder_weights

logger = build_logger(__name__)


class Encoded(NamedTuple):
    """Texts as tokens."""

    documents: list[IntArray]
    """`[CLS] text [SEP]` each."""

    num_truncated: int
    """Texts that were longer than the model."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Model:
    """An encoder with what it was trained with, and its tokenizer. `neobert.load` makes one."""

    module: ObjectiveModule
    tokenizer: Tokenizer
    objective: Objective
    """What it was trained for."""

    @property
    def masked_lm(self) -> ObjectiveModule:
        """`module` under the name that earlier versions gave it."""
        return self.module

    @property
    def max_length(self) -> int:
        """Longest text in tokens, [CLS] and [SEP] included."""
        return self.module.encoder.config.max_position_embeddings

    @property
    def hidden_size(self) -> int:
        return self.module.encoder.config.hidden_size

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Texts as `[CLS] text [SEP]`, cut at the model's length."""
        specials, limit = (self.tokenizer.cls_id, self.tokenizer.sep_id), self.max_length - 2
        tokens = self.tokenizer.encode_batch(texts)
        documents = [np.array([specials[0], *ids[:limit], specials[1]], dtype=np.int32) for ids in tokens]
        return Encoded(documents, sum(len(ids) > limit for ids in tokens))

    def hidden_states(self, texts: Sequence[str], *, batch_tokens: int = BATCH_TOKENS) -> list[Tensor]:
        """The last hidden states of each text, fp32 `[tokens, H]` on the host, [CLS] first and [SEP] last."""
        return self.token_states(self._encode_all(texts), batch_tokens=batch_tokens)

    def token_states(self, documents: Sequence[IntArray], *, batch_tokens: int = BATCH_TOKENS) -> list[Tensor]:
        """The same of documents that `encode` made."""
        found: dict[int, Tensor] = {}
        for batch in plan_batches([len(tokens) for tokens in documents], batch_tokens):
            hidden = hidden_states(self.module, [documents[item] for item in batch]).float().cpu()
            found |= zip(batch, hidden.split([len(documents[item]) for item in batch]))
        return [found[item] for item in range(len(documents))]

    def embed(
        self,
        texts: Sequence[str],
        *,
        pooling: str = "mean",
        normalize: bool = False,
        batch_tokens: int = BATCH_TOKENS,
    ) -> Tensor:
        """One vector a text, fp32 `[texts, H]` on the host.

        Args:
            pooling: `mean` or `max` over all tokens of the text, [CLS] and [SEP] included, or `cls`: the first one.
            normalize: scale every vector to length 1.

        Raises:
            ValueError: the pooling is unknown.
        """
        choose_pooling(pooling)
        documents = self._encode_all(texts)
        return self.embed_tokens(documents, pooling=pooling, normalize=normalize, batch_tokens=batch_tokens)

    def embed_tokens(
        self, documents: Sequence[IntArray], *, pooling: str, normalize: bool, batch_tokens: int
    ) -> Tensor:
        """The same of documents that `encode` made."""
        pool = choose_pooling(pooling)
        vectors = torch.empty(len(documents), self.hidden_size)
        for batch in plan_batches([len(tokens) for tokens in documents], batch_tokens):
            chosen = [documents[item] for item in batch]
            hidden = hidden_states(self.module, chosen).float()
            lengths = torch.tensor([len(tokens) for tokens in chosen], device=hidden.device)
            vectors[torch.tensor(batch)] = pool(hidden, lengths).cpu()
        return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors

    def predict(self, texts: Sequence[str], *, top_k: int = 5, joint: bool = False) -> Sequence[Answer]:
        """What the model was trained to answer: tokens for every `[MASK]`; of a model of replaced-token detection, how
        likely each token was replaced; of one of causal language modelling, which tokens come next.

        Raises:
            ValueError: it cannot answer for a text or an option; see `fill_mask`, `objectives.replaced_token` and
                `next_tokens`.
        """
        answers: Answers = load_part(self.objective.answers)
        return answers.answer(self, texts, top_k=top_k, joint=joint)

    def check_fills_masks(self) -> None:
        """Raises DataError when the model was not trained to fill masks: what it says of them means nothing."""
        if not self.objective.fills_masks:
            raise DataError(
                f"this model was trained with {self.objective.title}, and fills no masks; take a model of masked "
                "language modelling, or ask this one with scripts/predict.py"
            )

    def fill_mask(self, texts: Sequence[str], *, top_k: int = 5, joint: bool = False) -> list[FilledText]:
        """The most likely tokens for every `[MASK]`; see `neobert.inference.fill_mask.fill_mask`.

        Raises:
            DataError: the model was not trained to fill masks.
        """
        self.check_fills_masks()
        return fill_mask(self.module, self.tokenizer, texts, top_k=top_k, joint=joint)

    def digest(self) -> str:
        """sha256 of architecture, weights and tokenizer: equal digests give equal answers."""
        return digest_model(f"{self.module.encoder.config.to_dict()}{self.tokenizer.digest}", self.module)

    def _encode_all(self, texts: Sequence[str]) -> list[IntArray]:
        documents, num_truncated = self.encode(texts)
        if num_truncated:
            logger.warning(
                "%d of %d texts are longer than the model (%d tokens) and were cut; shorten or split them",
                num_truncated,
                len(texts),
                self.max_length,
            )
        return documents


def digest_model(description: str, module: nn.Module) -> str:
    """sha256 of a description and of the weights of a module."""
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()}"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Beside `auto`, see `choose_dtype`."""


def load(
    path: str | Path, *, device: str | torch.device = "auto", dtype: str = "auto", weights: str = "model"
) -> Model:
    """A trained model with its tokenizer, ready to answer.

    Args:
        path: a checkpoint; a run folder or its `checkpoints` folder, which mean the newest checkpoint; an exported
            folder; a model of the hub (`owner/model`) in a layout that `neobert.weights.layouts` knows.
        device: `auto` takes a GPU when there is one.
        dtype: of matrix products: `fp32`; `bf16`, as in training with `trainer.mixed_precision: bf16`; `auto` is bf16
            on a GPU that has it, else fp32. fp32 on a GPU is TF32 only where `torch.set_float32_matmul_precision` was
            called for it.
        weights: `model`, or `ema` for the moving average of a checkpoint of a run with `trainer.ema_decay`.

    Raises:
        WeightsError: there is no model at `path`, or it is damaged, or has no tokenizer.
        ValueError: the dtype or the device is unknown, or not there.
    """
    chosen = choose_device(device)
    products = choose_dtype(dtype, chosen)
    return build_loaded(load_encoder_weights(path, weights=weights), chosen, products)


def build_loaded(found: EncoderWeights, device: torch.device, products: torch.dtype) -> Model:
    """The model of weights that were read, on `device`, with matrix products in `products`.

    Raises:
        WeightsError: they have no tokenizer.
    """
    if found.tokenizer is None:
        raise WeightsError(f"{found.folder} has no tokenizer.json; put the tokenizer of the model there")
    objective = OBJECTIVES[found.objective]
    encoder = build_encoder_of(
        found.config, choose_attention("auto", device=device, dtype=products, head_dim=found.config.head_dim)
    )
    # An exported folder has the head of no objective.
    has_head = bool(found.training_only) or objective.predicts_tokens
    module = objective.build_trained(encoder, found.head) if has_head else ObjectiveModule(encoder)
    tensors = {**found.training_only, **found.tensors}
    module.load_state_dict(
        {name: tensors[name].float() for name in module.state_dict() if name in tensors}, strict=True
    )
    module.check_tied()
    for part in module.modules():
        if isinstance(part, nn.Linear):  # Embeddings and norms stay fp32, and with them the residual stream.
            part.to(products)
    tokenizer = load_tokenizer(TokenizerSection(path=str(found.tokenizer)))
    if tokenizer.note is not None:
        warnings.warn(tokenizer.note, stacklevel=2)
    return Model(module=module.to(device).eval(), tokenizer=tokenizer, objective=objective)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The type of matrix products that is meant. Raises ValueError for an unknown name."""
    if dtype == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is unknown; write one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def choose_device(device: str | torch.device) -> torch.device:
    """The device that is meant. Raises ValueError for one that this machine does not have."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: {device!r} is unknown; write auto, cpu, cuda or mps") from error
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(chosen.type, True):
        raise ValueError(f"device: {device} is not here (torch sees no GPU of that kind); write cpu or auto")
    return chosen
