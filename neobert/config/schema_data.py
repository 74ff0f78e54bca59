"""Keys of `dataset`, `tokenizer` and `datacollator`: what is read and how it becomes rows."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSection:
    """Where the documents come from and how they are read."""

    name: str | None = None
    """Name of a dataset on the Hugging Face hub, or `python_stdlib`: the source code of the running Python's standard
    library, which needs no download. Not used when `path` is given."""

    config: str | None = None
    """Configuration of the hub dataset, for example `20231101.en`."""

    revision: str | None = None
    """Branch, tag or commit of the hub dataset; null is its main branch."""

    path: str | None = None
    """A local file or folder: a folder written by `save_to_disk`, or JSONL files (plain or .gz). Replaces `name`. In a
    folder of files, names that start with train, validation, eval, test or dev are splits; otherwise all is train."""

    streaming: bool | None = None
    """null: text files are streamed, `save_to_disk` folders are indexed. true: never build an index.
    false: text is tokenised once to disk, then indexed."""

    cache_dir: str | None = None
    """Where data downloaded from the hub is kept; null is the Hugging Face cache."""

    max_seq_length: int = 512
    """Slots of a row, [CLS] and [SEP] included: the one length that decides."""

    text_column: str | None = None
    """Column with the text. null takes `text`, `content` or `sentence`, or the only text column there is. Not needed
    for data that has `input_ids`."""

    train_split: str | None = None
    """Split to train on; null is `train`, or everything where there are no splits."""

    eval_split: str | None = None
    """Split to evaluate on. null looks for validation, eval, test or dev, and then for `eval_samples`."""

    eval_samples: int | None = None
    """Evaluate on this many documents. Without an evaluation split they are the first ones of the training data and
    are never trained on. null: all documents of the evaluation split."""

    min_length: int = 5
    """Documents, and the tails of split documents, with fewer tokens than this are dropped and counted."""

    num_lanes: int | None = None
    """Independent readers whose rows take turns; null is 64 for indexed data and 16 for streams."""

    window_documents: int | None = None
    """Documents a lane shuffles and packs together; null is 1024 for indexed data and 256 for streams."""

    max_document_chars: int = 1_000_000
    """Longer texts are cut into pieces of this size, at white space, before they are tokenised."""

    max_bad_records: int = 100
    """Records that cannot be read are counted and skipped; more of them than this in one lane's epoch stop the run."""

    num_workers: int = 1
    """Threads that open windows ahead of the training loop; 0 reads in the main thread. Order does not depend on it."""

    prefetch_factor: int = 4
    """Optimizer steps whose batches are kept ready ahead."""

    pin_memory: bool | None = None
    """Put batches into page-locked memory, so that copies to the GPU overlap with work; null: yes on CUDA."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSection:
    """The tokenizer: named (`name` or `path`) or trained (`train: true`)."""

    name: str | None = None
    """Tokenizer on the Hugging Face hub. Not used when `path` is given."""

    path: str | None = None
    """Folder with a saved tokenizer. Replaces `name`."""

    revision: str | None = None
    """Branch, tag or commit of the hub tokenizer."""

    trust_remote_code: bool = False
    """Allow the hub tokenizer to run its own Python code."""

    max_length: int | None = None
    """Follows `dataset.max_seq_length`, which decides; another value is a warning and has no effect."""

    truncation: bool = False
    """false: documents longer than a row are split into several segments; true: the rest of them is dropped."""

    train: bool = False
    """Train a tokenizer on the training documents and keep it in the run folder."""

    algorithm: Literal["byte_bpe", "wordpiece"] = "byte_bpe"
    """What `train` trains: byte-level BPE (keeps case, no unknown tokens, identical from run to run) or WordPiece."""

    vocab_size: int | None = None
    """Size of the vocabulary to train, special tokens included; null is 32768. Only with `train`."""

    train_documents: int | None = None
    """Train on the first documents only, this many; null reads all. Only with `train`."""

    allow_special_token_rewrite: bool = False
    """Add the special tokens that a loaded tokenizer lacks ([CLS], [SEP], [MASK], padding); false: that is an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatacollatorSection:
    """How rows are built and masked."""

    mlm_probability: float = 0.2
    """Share of a row's ordinary tokens that is predicted. Of these 80% become [MASK], 10% a random token, and 10%
    stay. 20% is the rate of the NeoBERT paper."""

    eval_mlm_probability: float = 0.15
    """The same share in evaluation, always 80/10/10, so that losses of runs with different masking compare."""

    mask_all: bool = False
    """true: every predicted token becomes [MASK] in training."""

    pack_sequences: bool = True
    """true: several documents share a row and each attends to itself only, so that almost no slot is padding.
    false: one document per row."""

    pad_to_multiple_of: int | None = None
    """Without packing: pad a micro-batch to its longest document rounded up to this multiple. null: always to
    `dataset.max_seq_length`, so that shapes never change. Must divide `dataset.max_seq_length`."""

    max_length: int | None = None
    """Follows `dataset.max_seq_length`, which decides; another value is a warning and has no effect."""
