"""Keys of `dataset`, `tokenizer` and `datacollator`: what is read and how it becomes rows."""

from dataclasses import dataclass
from typing import Literal

MAX_RECORD_BYTES = 64 << 20
"""Far above any document of text, far below the memory of any machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureSource:
    """One source of `dataset.mixture`."""

    name: str | None = None
    """Hub dataset or `python_stdlib`. Not used when `path` is given."""

    config: str | None = None
    """Configuration of the hub dataset."""

    revision: str | None = None
    """Branch, tag or commit of the hub dataset."""

    path: str | tuple[str, ...] | None = None
    """Files or folder, as `dataset.path`."""

    split: str | None = None
    """Split or slice to train on; null is `dataset.train_split`."""

    text_column: str | None = None
    """Column with the text; null is `dataset.text_column`."""

    weight: float | None = None
    """Share of the documents, relative to the other weights; the source is read again when it ends. null for every
    source: each document once per epoch."""

    max_documents: int | None = None
    """Use only the first documents of the source, this many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSection:
    """Where the documents come from and how they are read."""

    name: str | tuple[str, ...] | None = None
    """Name of a dataset on the Hugging Face hub, or `python_stdlib`: the source code of the running Python's standard
    library, which needs no download. Several names (a list, or `a,b:5000`) are read as one corpus, each document once
    per epoch; `:5000` takes the first 5000 documents of a source. Not used when `path` or `mixture` is given."""

    config: str | None = None
    """Configuration of the hub dataset, for example `20231101.en`."""

    revision: str | None = None
    """Branch, tag or commit of the hub dataset; null is its main branch."""

    path: str | tuple[str, ...] | None = None
    """Files or folders, local or `s3://`, `gs://`, `hf://`; one, a list, or a pattern with `*`. JSONL, text and CSV
    (plain, .gz, .zst, .xz, .bz2), Parquet, or a folder written by `save_to_disk`. Replaces `name` and `mixture`. In a
    folder of files, train, validation, eval, test and dev are splits where they are whole words of a file's or folder's
    name; otherwise all is train."""

    mixture: tuple[MixtureSource, ...] = ()
    """Several sources: a list of mappings with `name` or `path`, and optionally `weight`, `max_documents`, `config`,
    `revision`, `split`, `text_column`. Replaces `name`. With weights, documents are drawn in these shares and a source
    that ends begins again; without, each document comes once per epoch."""

    streaming: bool | None = None
    """null: text files are streamed, `save_to_disk` folders are indexed. true: never build an index.
    false: text is tokenised once to disk, then indexed."""

    pre_tokenize: bool = False
    """Tokenise text once to `pre_tokenize_output` before training, as `streaming: false` does: rank 0 works, others
    wait."""

    pre_tokenize_output: str | None = None
    """Folder for tokenised text; null is the folder `tokenized` of `trainer.output_dir` in a run, and `path` or
    `tokenized_data/` for `preprocess.py`."""

    num_proc: int | None = None
    """Threads that tokenise when text is prepared on disk; null takes all cores."""

    cache_dir: str | None = None
    """Where data downloaded from the hub is kept; null is the Hugging Face cache."""

    max_seq_length: int = 512
    """Slots of a row, [CLS] and [SEP] included: the one length that decides."""

    text_column: str | None = None
    """Column with the text. null takes `text`, `content` or `sentence`, or the only text column there is. Not needed
    for data that has `input_ids`."""

    sample_by: Literal["line", "paragraph", "document"] = "line"
    """What one document of a plain text file is: a line, the lines between blank lines, or the whole file."""

    train_split: str | None = None
    """Split to train on, or a slice of one: `train[:1%]`, `train[1000:]`. null is `train`, or everything where there
    are no splits."""

    eval_split: str | None = None
    """Split (or slice) to evaluate on. null looks for validation, eval, test or dev, and then for `eval_samples` and
    `validation_split`."""

    eval_samples: int | None = None
    """Evaluate on this many documents. Without an evaluation split they are the first ones of the training data and
    are never trained on. null: all documents of the evaluation split."""

    validation_split: float | None = None
    """Without an evaluation split: hold out this share (0 to 1) of the training documents, the first ones. The source's
    size must be known."""

    min_length: int = 5
    """Documents, and the tails of split documents, with fewer tokens than this are dropped and counted."""

    num_lanes: int | None = None
    """Independent readers whose rows take turns; null is 64 for indexed data and 16 for streams, fewer where a lane
    would find no document to train on."""

    window_documents: int | None = None
    """Documents a lane shuffles and packs together; null is 1024 for indexed data and 256 for streams."""

    shuffle_buffer_size: int | None = None
    """Documents among which order is random, about: lanes x window. 0 keeps the order of the source. null leaves the
    choice to `num_lanes` and `window_documents`, beside which it may not be set."""

    max_document_chars: int = 1_000_000
    """Longer texts are cut into pieces of this size, at white space, before they are tokenised."""

    max_bad_records: int = 100
    """Records that cannot be read are counted and skipped; more of them than this in one lane's epoch stop the run. A
    broken quotation mark of CSV costs its line, which is a record here."""

    max_record_bytes: int = MAX_RECORD_BYTES
    """A longer record (a line of JSONL or text, a paragraph, a file, a row of CSV, a cell of Parquet) is never held in
    memory: it is a bad record. The default is 64 MiB."""

    on_bad_shard: Literal["error", "skip"] = "error"
    """A file that cannot be opened or decompressed, or that has no text in it. error: stop. skip: continue with the
    next one, now and whenever this stretch is read again; the data state keeps the list of those that failed on the
    way."""

    network_retries: int = 5
    """Times that a window is read again after a network error, with growing pauses, before the run stops."""

    num_workers: int | None = None
    """Threads that open windows ahead of the training loop; 0 reads in the main thread. null chooses by the number of
    cores. Order does not depend on it."""

    prefetch_factor: int | None = None
    """Optimizer steps whose batches are kept ready ahead; null is 4."""

    persistent_workers: bool = True
    """true: reader threads and their open windows stay during evaluations. false: they are closed before an evaluation
    and opened again behind it, which frees their memory and costs the time to open a window of each lane."""

    pin_memory: bool | None = None
    """Put batches into page-locked memory, so that copies to the GPU overlap with work; null: yes on CUDA."""

    alpha: float = 1.0
    """Contrastive: a step takes its pairs from one set, drawn with a chance in proportion to (its pairs) ** alpha. 0
    draws all sets equally often."""

    load_all_from_disk: bool = False
    """Contrastive: use every set that is prepared in `path`, whatever `name` says; `preprocess.py` fetches nothing."""

    force_redownload: bool = False
    """Contrastive: `preprocess.py` prepares sets anew that are there already."""


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
    """Share of a row's ordinary tokens that is predicted. 20% is the rate of the NeoBERT paper."""

    mlm_probability_final: float | None = None
    """The share at the end of training: from `mlm_probability` on it changes linearly with the step. null: constant."""

    mlm_probability_final_step: int | None = None
    """Step at which `mlm_probability_final` is reached, counted from the start of the run; null is the number of steps
    of the run."""

    eval_mlm_probability: float = 0.15
    """The same share in evaluation, always 80/10/10 and token by token, so that losses of runs with different masking
    compare."""

    mask_units: Literal["tokens", "words", "spans"] = "tokens"
    """What is drawn until the share is reached. tokens: each by itself. words: all tokens of a word. spans: up to
    `span_max_words` words in a row, the fewer the likelier. The last unit of a row may be cut short. words and spans
    need a tokenizer that marks where words begin."""

    span_max_words: int = 10
    """With `mask_units: spans`: words of the longest span. A span one word longer is 0.8 times as likely."""

    mask_fraction: float = 0.8
    """Share of the predicted tokens that becomes [MASK] in training."""

    random_fraction: float = 0.1
    """Share of the predicted tokens that becomes a random token in training; the rest stays as it is."""

    mask_all: bool = False
    """true: every predicted token becomes [MASK] in training, as with `mask_fraction: 1` and `random_fraction: 0`."""

    pack_sequences: bool = True
    """true: several documents share a row and each attends to itself only, so that almost no slot is padding.
    false: one document per row."""

    pad_to_multiple_of: int | None = None
    """Without packing: pad a micro-batch to its longest document rounded up to this multiple. null: always to
    `dataset.max_seq_length`, so that shapes never change. Must divide `dataset.max_seq_length`."""

    max_length: int | None = None
    """Follows `dataset.max_seq_length`, which decides; another value is a warning and has no effect."""
