"""Masked language models that can be asked for a loss: ours, packed, and others through transformers, padded."""

import warnings
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForMaskedLM

from neobert.data.tokenizer import Tokenizer, check_mask_token
from neobert.data.tokenizer_file import load_as_written
from neobert.errors import DataError
from neobert.inference.model import Model, choose_device, choose_dtype, digest_model, load
from neobert.inference.packed import evaluating, precision
from neobert.types import IGNORE_INDEX, PackedBatch
from neobert.weights.folder import find_checkpoint

_LOGITS_BYTES = 256 * 2**20


class BatchLoss(NamedTuple):
    """Sums over the targets of a batch."""

    loss: float
    """In nats."""

    num_correct: int


class Scorer(Protocol):
    """A masked language model with its tokenizer."""

    tokenizer: Tokenizer
    max_length: int
    packed: bool
    """Whether several documents may be in one row; else every row holds one."""

    def batch_rows(self, row_length: int, batch_tokens: int) -> int:
        """Rows of a batch."""

    def score(self, batch: PackedBatch) -> BatchLoss:
        """The loss of a batch."""

    def digest(self) -> str:
        """sha256 of architecture, weights and tokenizer."""


class OwnScorer:
    """A model of ours: the forward pass that training and its evaluation use."""

    packed = True

    def __init__(self, model: Model) -> None:
        model.check_fills_masks()
        self._loaded, self._model = model, model.module
        check_mask_token(model.tokenizer)
        self.tokenizer, self.max_length = model.tokenizer, model.max_length

    def batch_rows(self, row_length: int, batch_tokens: int) -> int:
        return max(1, batch_tokens // row_length)

    def score(self, batch: PackedBatch) -> BatchLoss:
        device = self._model.head_weight.device
        with evaluating(self._model), torch.inference_mode(), precision(self._model):
            sums = self._model(batch.to(device))
        return BatchLoss(float(sums.loss_sum), int(sums.num_correct))

    def digest(self) -> str:
        return self._loaded.digest()


class TransformersScorer:
    """A model that `AutoModelForMaskedLM` loads: one document a row, padding behind an attention mask.

    Raises:
        DataError: it cannot be loaded, has no vocabulary projection of its own, or its tokenizer has no mask.
    """

    packed = False

    def __init__(self, path: str, *, device: torch.device, dtype: torch.dtype, trust_remote_code: bool) -> None:
        try:
            loaded = load_as_written(path, trust_remote_code=trust_remote_code)
            model, info = AutoModelForMaskedLM.from_pretrained(
                path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"{path} is no checkpoint of ours, and transformers cannot load it ({reason.rstrip('.')}); give a run "
                "folder, a checkpoint, an exported folder or the name of a masked language model on the hub"
            ) from error
        if info["missing_keys"]:
            names = ", ".join(sorted(info["missing_keys"])[:3])
            raise DataError(
                f"{path} lacks weights of a masked language model ({names}); name a model that was saved with the head "
                "it was pretrained with"
            )
        if loaded.hf.mask_token is None:
            raise DataError(f"{path}: its tokenizer has no mask token; name a model that was trained with masks")
        self._model, self._device = model.to(device).eval(), device
        self.tokenizer = Tokenizer(loaded.hf)
        check_mask_token(self.tokenizer)
        if loaded.note is not None:
            warnings.warn(f"{path}: {loaded.note}", stacklevel=3)
        self.max_length = min(model.config.max_position_embeddings, loaded.hf.model_max_length)

    def batch_rows(self, row_length: int, batch_tokens: int) -> int:
        # These models compute logits for every slot: they bound the batch.
        most = _LOGITS_BYTES // (4 * self._model.config.vocab_size)
        return max(1, min(batch_tokens, most) // row_length)

    def score(self, batch: PackedBatch) -> BatchLoss:
        batch = batch.to(self._device)
        with torch.inference_mode():
            logits: Tensor = self._model(
                input_ids=batch.input_ids.long(), attention_mask=(batch.segments.ids > 0).long()
            ).logits
            predicted = logits.flatten(0, 1).index_select(0, batch.masked_index).float()
            loss = F.cross_entropy(predicted, batch.targets, ignore_index=IGNORE_INDEX, reduction="sum")
            num_correct = (predicted.argmax(dim=-1) == batch.targets).sum()
        return BatchLoss(float(loss), int(num_correct))

    def digest(self) -> str:
        return digest_model(f"{self._model.config.to_json_string()}{self.tokenizer.digest}", self._model)


def load_scorer(
    path: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False, weights: str = "model"
) -> Scorer:
    """The masked language model at `path`: ours where it holds a checkpoint, else through transformers. `weights` is
    as in `neobert.load`.

    Raises:
        DataError: it is neither; see `TransformersScorer`.
    """
    if find_checkpoint(Path(path)) is not None:
        return OwnScorer(load(path, device=device, dtype=dtype, weights=weights))
    if weights != "model":
        raise DataError(f"--weights: {weights!r} is of checkpoints of ours, and {path} holds none; write model")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise DataError(f"{path} holds neither a checkpoint nor a config.json; give a run folder or an exported model")
    chosen = choose_device(device)
    # There all weights would be bf16, norms and the residual stream too: only where it is asked for.
    products = choose_dtype("fp32" if dtype == "auto" else dtype, chosen)
    return TransformersScorer(path, device=chosen, dtype=products, trust_remote_code=trust_remote_code)
