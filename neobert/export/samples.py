"""The texts that exported models are asked about, and the documents that training makes of them."""

from collections.abc import Sequence

from neobert.data.tokenizer import Tokenizer
from neobert.objectives.classification import HeadInfo
from neobert.objectives.labelled_rows import encode_rows

TEXTS = (
    "the old house stands by the river.",
    "A second, longer text: it has a number (1984), a dash - and a question?",
    "x",
    "Ünïcode: naïve CAFÉ, 東京 and 🙂;\ttabs\nlines  two spaces, don't, 3.14, <b>x_1</b>",
)
SECONDS = (*TEXTS[1:], TEXTS[0])
"""The second texts, for a model of pairs."""


def sample_documents(tokenizer: Tokenizer, head: HeadInfo | None, longest: int) -> list[list[int]]:
    """TEXTS as a model of `longest` tokens was trained to read them."""
    if head is None:
        return wrap_texts(tokenizer, longest)
    if head.num_texts == 1:
        return wrap_texts(tokenizer, head.max_length)
    pairs = encode_rows(tokenizer, list(zip(TEXTS, SECONDS)), head.max_length).tokens
    return [[tokenizer.cls_id, *tokens.tolist(), tokenizer.sep_id] for tokens in pairs]


def wrap_texts(tokenizer: Tokenizer, max_length: int, texts: Sequence[str] = TEXTS) -> list[list[int]]:
    """Texts as documents of training, cut at `max_length` tokens."""
    plain = [ids.tolist()[: max_length - 2] for ids in tokenizer.encode_batch(list(texts))]
    return [[tokenizer.cls_id, *ids, tokenizer.sep_id] for ids in plain]
