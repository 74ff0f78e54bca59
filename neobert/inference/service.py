"""What a served model answers: requests and responses as plain values, without HTTP.

`/v1/embeddings` is the call that clients of OpenAI's API make: `input` is a text, a list of texts, a list of token ids
or a list of such lists; `encoding_format` is `float` or `base64` (little-endian fp32); vectors have length 1.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neobert.data.rows.lanes import IntArray
from neobert.inference.batcher import Batcher, Closed, Overloaded
from neobert.inference.fill_mask import MASK_TEXT
from neobert.inference.packed import BATCH_TOKENS
from neobert.inference.text_encoder import OwnEncoder
from neobert.objectives.late_interaction import TOKENS

_EMBED = "embed"
Vector = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeLimits:
    """What one request, and all that wait, may hold. Raises ValueError for a number below 1."""

    max_texts: int = 2048
    """Texts of a request."""

    max_tokens: int = 262_144
    """Tokens of a request."""

    max_guesses: int = 100_000
    """Masks of a request to fill, times the tokens that are answered for each."""

    max_body_bytes: int = 16 << 20
    max_waiting: int = 64
    """Requests that wait while others are computed."""

    truncate: bool = False
    """Cut texts that are longer than the model, instead of refusing them."""

    def __post_init__(self) -> None:
        for name in ("max_texts", "max_tokens", "max_guesses", "max_body_bytes", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: {getattr(self, name)}; write a positive number")


class RequestError(Exception):
    """A request that is not answered: a status of HTTP, a sentence, and the field it is about."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    def to_dict(self) -> dict[str, Any]:
        """The body of the response, as OpenAI's API has it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": None}}


class Service:
    """A model that answers requests of several threads.

    Args:
        encoder: The model, its pooling and its length.
        name: What clients call it.

    Raises:
        ValueError: the model makes no vectors of texts.
    """

    def __init__(self, encoder: OwnEncoder, name: str, limits: ServeLimits) -> None:
        if encoder.settings.pooling == TOKENS:
            raise ValueError(
                "--pooling: this model keeps the vectors of all tokens, and the call for embeddings returns one of a "
                "text; write mean, cls or max"
            )
        self.encoder, self.name, self.limits = encoder, name, limits
        self._batcher = Batcher(self._compute, max_tokens=4 * BATCH_TOKENS, max_waiting=limits.max_waiting)

    def close(self) -> None:
        """Answers what waits, and nothing after that."""
        self._batcher.close()

    def health(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Whether it answers."""
        return {"status": "ok", "model": self.name, "waiting": self._batcher.num_waiting}

    def models(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The list that clients choose a name from."""
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "local"}
        return {"object": "list", "data": [model]}

    def embeddings(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """A vector of length 1 for each text.

        Raises:
            RequestError: a field is wrong, a limit is exceeded, or too much waits.
        """
        self._check_fields(request, ("model", "input", "encoding_format", "dimensions", "user", "prompt_name"))
        form = request.get("encoding_format") or "float"
        if not isinstance(form, str) or form not in ENCODINGS:
            raise RequestError(
                400, f"encoding_format: {form!r} is unknown; write {' or '.join(ENCODINGS)}", "encoding_format"
            )
        width = request.get("dimensions", self.encoder.model.hidden_size)
        if not _is_number(width) or not 1 <= width <= self.encoder.model.hidden_size:
            largest = self.encoder.model.hidden_size
            raise RequestError(400, f"dimensions: {width!r}; write a number from 1 to {largest}", "dimensions")
        documents = self._read_documents(request)
        num_tokens = self._check_size(documents)
        vectors = [_cut(vector, width) for vector in self._ask(_EMBED, documents, num_tokens)]
        encode = ENCODINGS[form]
        data = [{"object": "embedding", "index": i, "embedding": encode(x)} for i, x in enumerate(vectors)]
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return {"object": "list", "data": data, "model": self.name, "usage": usage}

    def fill_mask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The most likely tokens for every `[MASK]` of each text.

        Raises:
            RequestError: as of `embeddings`, and where the model was not trained to fill masks.
        """
        self._check_fields(request, ("model", "input", "top_k"))
        objective = self.encoder.model.objective
        if not objective.fills_masks:
            raise RequestError(
                400, f"model: {self.name} was trained with {objective.title} and fills no masks", "model"
            )
        top_k = request.get("top_k", 5)
        if not _is_number(top_k):
            raise RequestError(400, f"top_k: {top_k!r}; write a number", "top_k")
        texts = self._read_input(request)
        if not all(isinstance(text, str) for text in texts):
            raise RequestError(400, f"input: write a text with {MASK_TEXT}, or a list of them", "input")
        tokenizer = self.encoder.model.tokenizer
        marks = {MASK_TEXT, tokenizer.decode_token(tokenizer.mask_id)}
        num_guesses = top_k * sum(text.count(mark) for text in texts for mark in marks)
        if num_guesses > self.limits.max_guesses:
            raise RequestError(
                413,
                f"top_k: {top_k} tokens for each mask are {num_guesses:,}, and a request may have "
                f"{self.limits.max_guesses:,}; write fewer, or send several requests",
                "top_k",
            )
        num_tokens = self._check_size(tokenizer.encode_batch(texts))
        try:
            filled = self._ask(top_k, texts, num_tokens)
        except ValueError as error:
            raise RequestError(400, str(error), "input") from error
        data = [{"object": "filled_text", "index": i, **asdict(x)} for i, x in enumerate(filled)]
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return {"object": "list", "data": data, "model": self.name, "usage": usage}

    def _check_fields(self, request: Mapping[str, Any], known: Sequence[str]) -> None:
        for name in request:
            if name not in known:
                raise RequestError(400, f"{name}: unknown field; known are {', '.join(known)}", name)
        if request.get("model") not in (None, self.name):
            raise RequestError(404, f"model: {request['model']!r} is not served here; write {self.name!r}", "model")

    def _read_input(self, request: Mapping[str, Any]) -> list[Any]:
        """Texts, or lists of token ids."""
        found = request.get("input")
        if isinstance(found, str) or (isinstance(found, list) and found and all(map(_is_number, found))):
            found = [found]
        if not isinstance(found, list) or not found:
            raise RequestError(400, "input: write a text, a list of texts, or token ids", "input")
        if len(found) > self.limits.max_texts:
            raise RequestError(
                413, f"input: {len(found)} texts, and a request may have {self.limits.max_texts}; send several", "input"
            )
        for number, item in enumerate(found):
            if isinstance(item, str) and not is_unicode(item):
                raise RequestError(400, f"input[{number}] has half of a surrogate pair; send valid Unicode", "input")
        return found

    def _read_documents(self, request: Mapping[str, Any]) -> list[IntArray]:
        """`[CLS] text [SEP]` of each input."""
        found, tokenizer = self._read_input(request), self.encoder.model.tokenizer
        prefix = self._choose_prefix(request.get("prompt_name"))
        texts = [item for item in found if isinstance(item, str)]
        encoded = iter(tokenizer.encode_batch([prefix + text for text in texts]))
        documents = []
        for number, item in enumerate(found):
            if not isinstance(item, str):
                documents.append(self._read_tokens(item, number))
            elif item:
                documents.append(self._wrap(next(encoded).tolist(), number))
            else:
                raise RequestError(400, f"input[{number}] is empty; leave it out", "input")
        return documents

    def _choose_prefix(self, name: Any) -> str:
        prompts = dict(self.encoder.settings.prompts)
        if name is not None and not (isinstance(name, str) and name in prompts):
            known = ", ".join(prompts) or "none"
            raise RequestError(400, f"prompt_name: {name!r} is unknown; this model has {known}", "prompt_name")
        return "" if name is None else prompts[name]

    def _read_tokens(self, item: Any, number: int) -> IntArray:
        tokenizer = self.encoder.model.tokenizer
        if not isinstance(item, list) or not item or not all(map(_is_number, item)):
            raise RequestError(400, f"input[{number}]: write a text, or a list of token ids", "input")
        largest = tokenizer.size - 1
        if not all(0 <= token <= largest for token in item):
            raise RequestError(400, f"input[{number}]: token ids of this model are 0 to {largest}", "input")
        is_wrapped = len(item) > 1 and (item[0], item[-1]) == (tokenizer.cls_id, tokenizer.sep_id)
        return self._wrap(item[1:-1] if is_wrapped else item, number)

    def _wrap(self, tokens: Sequence[int], number: int) -> IntArray:
        tokenizer, longest = self.encoder.model.tokenizer, self.encoder.settings.max_length
        if len(tokens) + 2 > longest and not self.limits.truncate:
            raise RequestError(
                400,
                f"input[{number}] has {len(tokens) + 2} tokens, [CLS] and [SEP] included, and the model takes "
                f"{longest}; shorten it, or start the server with --truncate",
                "input",
            )
        return np.array([tokenizer.cls_id, *tokens[: longest - 2], tokenizer.sep_id], dtype=np.int32)

    def _check_size(self, documents: Sequence[IntArray]) -> int:
        num_tokens = sum(map(len, documents))
        if num_tokens > self.limits.max_tokens:
            raise RequestError(
                413,
                f"input: {num_tokens} tokens, and a request may have {self.limits.max_tokens}; send several",
                "input",
            )
        return num_tokens

    def _ask(self, kind: str | int, items: Sequence[Any], num_tokens: int) -> Sequence[Any]:
        try:
            return self._batcher.compute(kind, items, num_tokens)
        except Overloaded:
            waiting = self.limits.max_waiting
            raise RequestError(503, f"{waiting} requests wait already; try again later") from None
        except Closed:
            raise RequestError(503, "the server is stopping") from None

    def _compute(self, kind: str | int, items: Sequence[Any]) -> Sequence[Any]:
        """In the thread of the batcher: vectors of documents, or with a number as kind that many guesses for texts."""
        model = self.encoder.model
        if isinstance(kind, int):
            return model.fill_mask(items, top_k=kind)
        return self._embed(items)

    def _embed(self, documents: Sequence[IntArray]) -> list[Vector]:
        vectors = self.encoder.model.embed_tokens(
            documents, pooling=self.encoder.settings.pooling, normalize=True, batch_tokens=BATCH_TOKENS
        )
        return list(vectors.numpy())


def _cut(vector: Vector, width: int) -> Vector:
    """Its first numbers, of length 1 again."""
    return vector if width == len(vector) else vector[:width] / max(float(np.linalg.norm(vector[:width])), 1e-12)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


ENCODINGS = {
    "float": lambda vector: vector.tolist(),
    "base64": lambda vector: base64.b64encode(vector.astype("<f4").tobytes()).decode(),
}
"""encoding_format -> how a vector is written."""
