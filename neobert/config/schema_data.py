"""Keys of `dataset`, `tokenizer` and `datacollator`: what is read and how it becomes rows."""

from dataclasses import dataclass
from typing import Literal

from neobert.key import key, when

MASKS = "task=pretraining or contrastive.pretraining_objective=mlm"
"""What keys of masks need: pretraining, or fine-tuning in which some steps are masked language modelling."""

PREDICTS_TOKENS = "trainer.objective=mlm|clm|mlm_jepa|distill"
"""What keys of the loss over the vocabulary need: an objective that predicts tokens (`Objective.predicts_tokens`)."""

FILLS_MASKS = "trainer.objective=mlm|mlm_jepa|distill"
"""What keys of [MASK] need: an objective that hides tokens (`Objective.fills_masks`). Values are joined by `|`."""

_FIXED_RATE = "datacollator.mlm_rate=fixed"

MAX_RECORD_BYTES = 64 << 20
"""Far above any document of text, far below the memory of any machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureSource:
    """One source of `dataset.mixture`."""

    # On resume another name or path is another source; other weights and limits of the same ones are declared.
    name: str | None = key(None, resume="order", changes="source")
    """Hub dataset or `python_stdlib`. Not used when `path` is set."""

    config: str | None = key(None, resume="order", changes="source")
    """Configuration of the hub dataset."""

    revision: str | None = key(None, resume="order", changes="source")
    """Branch, tag or commit of the hub dataset."""

    path: str | tuple[str, ...] | None = key(None, path=True, resume="order", changes="source")
    """Files or folder, as `dataset.path`."""

    split: str | None = key(None, resume="order", changes="source")
    """Split or slice to train on; null is `dataset.train_split`."""

    text_column: str | None = key(None, resume="order")
    """Column with the text; null is `dataset.text_column`."""

    weight: float | None = key(None, above=0, because="leave a source out by removing it", resume="order")
    """Fraction of the documents, relative to the other weights; the source is read again when it ends. null for every
    source: each document once per epoch."""

    max_documents: int | None = key(None, at_least=1, resume="order")
    """Use only the first documents of the source, this many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSection:
    """Where the documents come from and how they are read."""

    name: str | tuple[str, ...] | None = key(None, resume="order", changes="source")
    """Name of a dataset on the Hugging Face hub, or `python_stdlib`: the source code of the running Python's standard
    library, which needs no download. Several names (a list, or `a,b:5000`) are read as one corpus, each document once
    per epoch; `:5000` takes the first 5000 documents of a source. Not used when `path` or `mixture` is set."""

    config: str | None = key(None, tasks="pretraining finetune", resume="order", changes="source")
    """Configuration of the hub dataset, for example `20231101.en`."""

    revision: str | None = key(None, tasks="pretraining finetune glue", resume="order", changes="source")
    """Branch, tag or commit of the hub dataset; null is its main branch."""

    path: str | tuple[str, ...] | None = key(None, path=True, resume="order", changes="source")
    """Files or folders, local or `s3://`, `gs://`, `hf://`; one, a list, or a pattern with `*`. JSONL, text and CSV
    (plain, .gz, .zst, .xz, .bz2), Parquet, or a folder written by `save_to_disk`. Replaces `name` and `mixture`. In a
    folder of files, train, validation, eval, test and dev are splits where they are whole words of a file's or folder's
    name; otherwise all is train."""

    mixture: tuple[MixtureSource, ...] = key((), tasks="pretraining", resume="order", changes="source")
    """Several sources: a list of mappings with `name` or `path`, and optionally `weight`, `max_documents`, `config`,
    `revision`, `split`, `text_column`. Replaces `name`. With weights, documents are drawn in these proportions and a
    source that ends starts again; without, each document comes once per epoch. See `mixture_alpha` for tokens."""

    mixture_alpha: float | None = key(None, at_least=0, needs="dataset.mixture", tasks="pretraining", resume="order")
    """Mix by tokens: the fraction of the tokens that a source gets is in proportion to its `weight` (1 where none is
    set) x (its tokens) ** mixture_alpha. 0: the weights are fractions of the tokens. 1: each source by its size.
    Between them small sources come more often than their size says; 1 / mixture_alpha is called the temperature. Needs
    tokens on disk (`streaming: false`). null: weights are fractions of the documents."""

    streaming: bool | None = key(None, tasks="pretraining", resume="order", changes="source")
    """null: text files are streamed, `save_to_disk` folders are indexed. true: never build an index.
    false: text is tokenised once to disk, then indexed."""

    pre_tokenize: bool = key(False, tasks="pretraining", resume="order", changes="source")
    """Tokenise text once to `pre_tokenize_output` before training, as `streaming: false` does: rank 0 works, others
    wait."""

    # The documents are compared, not where they are: free.
    pre_tokenize_output: str | None = key(None, path=True, tasks="pretraining", resume="free")
    """Folder for tokenised text; null is the folder `tokenized` of `trainer.output_dir` in a run, and `path` or
    `tokenized_data/` for `preprocess.py`."""

    num_proc: int | None = key(None, at_least=1, tasks="pretraining", machine=True, resume="free")
    """Threads that tokenise when text is prepared on disk; null takes all cores."""

    cache_dir: str | None = key(None, path=True, tasks="pretraining", machine=True, resume="free")
    """Where data downloaded from the hub is kept; null is the Hugging Face cache."""

    max_seq_length: int = key(512, at_least=3, because="[CLS], one token and [SEP]", resume="order")
    """Slots of a row, [CLS] and [SEP] included: the one length that decides."""

    # Declared only where the documents become others.
    text_column: str | None = key(None, tasks="pretraining", resume="order", changes="split")
    """Column with the text. null takes `text`, `content` or `sentence`, or the only text column there is. Not needed
    for data that has `input_ids`."""

    sample_by: Literal["line", "paragraph", "document"] = key(
        "line", tasks="pretraining", resume="order", changes="split"
    )
    """What one document of a plain text file is: a line, the lines between blank lines, or the whole file."""

    train_split: str | None = key(None, tasks="pretraining finetune", resume="order", changes="source")
    """Split to train on, or a slice of one: `train[:1%]`, `train[1000:]`. null is `train`, or everything where there
    are no splits."""

    # Losses before and after could not be compared: declared, as all that decides what is evaluated.
    eval_split: str | None = key(None, tasks="pretraining finetune", resume="declared", changes="split evaluation")
    """Split (or slice) to evaluate on. null looks for validation, eval, test or dev, and then for `eval_samples` and
    `validation_split`."""

    eval_samples: int | None = key(None, at_least=1, resume="declared", changes="split evaluation")
    """Evaluate on this many documents. Without an evaluation split they are the first ones of the training data (with
    `task: finetune` rows that are drawn) and are never trained on. null: all documents of the evaluation split."""

    validation_split: float | None = key(
        None, above=0, below=1, tasks="pretraining finetune", resume="declared", changes="split evaluation"
    )
    """Without an evaluation split: hold out this fraction (0 to 1) of the training documents, the first ones; with
    `task: finetune` rows that are drawn. The size of the source must be known."""

    min_length: int = key(5, at_least=0, tasks="pretraining", resume="order")
    """Documents, and the tails of split documents, with fewer tokens than this are dropped and counted."""

    num_lanes: int | None = key(None, at_least=1, tasks="pretraining", resume="order")
    """Independent readers whose rows take turns; null is 64 for indexed data and 16 for streams (in a run that
    first starts with more processes than 16, one for each), fewer where a lane would find no document to train on."""

    window_documents: int | None = key(None, at_least=1, tasks="pretraining", resume="order")
    """Documents a lane shuffles and packs together; null is 1024 for indexed data and 256 for streams."""

    shuffle_buffer_size: int | None = key(None, at_least=0, tasks="pretraining", resume="order")
    """Documents among which order is random, about: lanes x window. 0 keeps the order of the source. null leaves the
    choice to `num_lanes` and `window_documents`, beside which it may not be set."""

    max_document_chars: int = key(1_000_000, at_least=1, tasks="pretraining", resume="order")
    """Longer texts are cut into pieces of this size, at white space, before they are tokenised."""

    # Decides which records train, but moves no row that was read: declared, and the order continues.
    max_bad_records: int = key(100, at_least=0, resume="declared")
    """Records that cannot be read are counted and skipped; more of them than this in one lane's epoch stop the run. A
    broken quotation mark of CSV costs its line, which is a record here."""

    max_record_bytes: int = key(MAX_RECORD_BYTES, at_least=1, resume="order", changes="split")
    """A longer record (a line of JSONL or text, a paragraph, a file, a row of CSV, a cell of Parquet) is never held in
    memory: it is a bad record. The default is 64 MiB."""

    # As max_bad_records: it may be set after the file was met, and the order continues.
    on_bad_shard: Literal["error", "skip"] = key("error", tasks="pretraining", resume="declared")
    """A file that cannot be opened or decompressed, or that has no text in it. error: stop. skip: continue with the
    next one, now and whenever this stretch is read again; the data state keeps the list of those that failed on the
    way."""

    network_retries: int = key(5, at_least=0, tasks="pretraining", machine=True, resume="free")
    """Times that a window is read again after a network error, with growing pauses, before the run stops."""

    num_workers: int | None = key(None, at_least=0, machine=True, resume="free")
    """Threads that open windows ahead of the training loop; 0 reads in the main thread. null chooses by the number of
    cores. Order does not depend on it."""

    prefetch_factor: int | None = key(None, at_least=1, machine=True, resume="free")
    """Optimizer steps whose batches are kept ready ahead; null is 4."""

    persistent_workers: bool = key(True, resume="free")
    """true: reader threads and their open windows stay during evaluations. false: they are closed before an evaluation
    and opened again after it, which frees their memory and costs the time to open a window of each lane."""

    pin_memory: bool | None = key(None, machine=True, resume="free")
    """Put batches into page-locked memory, so that copies to the GPU overlap with work; null: yes on CUDA."""

    alpha: float = key(
        1.0,
        at_least=0,
        because="0 draws all sets equally often",
        tasks="contrastive",
        resume="declared",
        changes="batch",
    )
    """Contrastive: a step takes its pairs from one set, drawn with a chance in proportion to (its pairs) ** alpha. 0
    draws all sets equally often."""

    load_all_from_disk: bool = key(False, tasks="contrastive", resume="order", changes="source")
    """Contrastive: use every set that is prepared in `path`, whatever `name` says; `preprocess.py` fetches nothing."""

    force_redownload: bool = key(False, tasks="contrastive", resume="free")
    """Contrastive: `preprocess.py` prepares sets again that are there already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSection:
    """The tokenizer: named (`name` or `path`) or trained (`train: true`)."""

    # Fixed where it names the one in use: it is not fetched only to be compared.
    name: str | None = key(None, resume="fixed")
    """Tokenizer on the Hugging Face hub. Not used when `path` is set."""

    # The checkpoint brings the tokenizer, and its digest is compared: how it was found or trained is free.
    path: str | None = key(None, path=True, resume="free")
    """Folder with a saved tokenizer. Replaces `name`."""

    revision: str | None = key(None, needs="tokenizer.name", resume="free")
    """Branch, tag or commit of the hub tokenizer."""

    trust_remote_code: bool = key(False, resume="free")
    """Allow the hub tokenizer to run its own Python code."""

    max_length: int | None = key(None, resume="free")
    """Follows `dataset.max_seq_length`, which decides; another value is a warning and has no effect."""

    truncation: bool = key(False, tasks="pretraining", resume="order")
    """false: documents longer than a row are split into several segments; true: the rest of them is dropped."""

    train: bool = key(False, tasks="pretraining", resume="free")
    """Train a tokenizer on the training documents and keep it in the run folder."""

    algorithm: Literal["byte_bpe", "wordpiece"] = key("byte_bpe", resume="free")
    """What `train` trains: byte-level BPE (keeps case, no unknown tokens, identical from run to run) or WordPiece."""

    vocab_size: int | None = key(None, at_least=16, needs="tokenizer.train", resume="free")
    """Size of the vocabulary to train, special tokens included; null is 32768. The size of the embedding is
    `model.vocab_size`."""

    train_documents: int | None = key(None, at_least=1, needs="tokenizer.train", resume="free")
    """Train on the first documents only, this many; null reads all."""

    allow_special_token_rewrite: bool = key(False, resume="free")
    """Add the special tokens that a loaded tokenizer lacks ([CLS], [SEP], [MASK], padding); false: that is an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatacollatorSection:
    """How rows are built and masked."""

    mlm_probability: float = key(
        0.2,
        above=0,
        at_most=1,
        needs=(MASKS, _FIXED_RATE),
        resume="declared",
        changes="batch",
    )
    """Fraction of a row's ordinary tokens that is predicted. 20% is the rate of the NeoBERT paper."""

    mlm_rate: Literal["fixed", "random", "diffusion"] = key(
        "fixed", needs=(MASKS, FILLS_MASKS), resume="declared", changes="batch"
    )
    """fixed: `mlm_probability` in every row. Else each row draws its fraction from `mlm_rate_range`: random uniformly
    (R2MAE); diffusion the smaller the likelier, with density 1 / fraction, which is masked diffusion (MDLM, LLaDA) by
    other draws instead of weights. The number of predicted tokens then varies from step to step."""

    mlm_rate_range: tuple[float, float] = key(
        (0.05, 0.5),
        above=0,
        at_most=1,
        needs="datacollator.mlm_rate=random|diffusion",
        resume="declared",
        changes="batch",
    )
    """Smallest and largest fraction that a row draws. Masked diffusion is [0.01, 1], about."""

    mlm_probability_final: float | None = key(
        None, above=0, at_most=1, needs=_FIXED_RATE, tasks="pretraining", resume="declared", changes="batch"
    )
    """The fraction at the end of training: from `mlm_probability` on it changes linearly with the step.
    null: constant."""

    mlm_probability_final_step: int | None = key(
        None,
        at_least=1,
        needs="datacollator.mlm_probability_final",
        tasks="pretraining",
        resume="declared",
        changes="batch",
    )
    """Step at which `mlm_probability_final` is reached, counted from the start of the run; null is the number of steps
    of the run."""

    eval_mlm_probability: float = key(
        0.15, above=0, at_most=1, tasks="pretraining", resume="declared", changes="evaluation"
    )
    """The same fraction in evaluation, always 80/10/10 and token by token, so that losses of runs with different
    masking compare."""

    mask_units: Literal["tokens", "words", "spans"] = key("tokens", needs=MASKS, resume="declared", changes="batch")
    """What is drawn until the fraction is reached. tokens: each by itself. words: all tokens of a word. spans: up to
    `span_max_words` words in a row, the fewer the likelier. The last unit of a row may be cut short. words and spans
    need a tokenizer that marks where words begin."""

    span_max_words: int = key(
        10,
        at_least=1,
        needs=(MASKS, "datacollator.mask_units=spans"),
        resume="declared",
        changes="batch",
    )
    """With `mask_units: spans`: words of the longest span. A span one word longer is 0.8 times as likely."""

    mask_weights: Literal["uniform", "adaptive"] = key(
        "uniform",
        needs=(FILLS_MASKS, "datacollator.mask_units=tokens"),
        tasks="pretraining",
        resume="declared",
        changes="batch",
    )
    """uniform: every token is as likely to be hidden. adaptive: the worse the model predicts a token of the vocabulary,
    the likelier (AMLM, arXiv 2510.20475), up to ten times; how many tokens of a row are hidden stays the same. Not with
    sharded weights."""

    mask_weights_steps: int = key(
        200,
        at_least=2,
        needs="datacollator.mask_weights=adaptive",
        tasks="pretraining",
        resume="declared",
        changes="batch",
    )
    """Steps between two refreshes of the weights. Each costs a forward pass over up to 8 of them."""

    mask_fraction: float = key(
        0.8,
        at_least=0,
        at_most=1,
        needs=(MASKS, "datacollator.mask_all=false", FILLS_MASKS),
        resume="declared",
        changes="batch",
    )
    """Fraction of the predicted tokens that becomes [MASK] in training."""

    random_fraction: float = key(
        0.1,
        at_least=0,
        at_most=1,
        needs=(MASKS, "datacollator.mask_all=false", FILLS_MASKS),
        resume="declared",
        changes="batch",
    )
    """Fraction of the predicted tokens that becomes a random token in training; the rest stays as it is."""

    mask_all: bool = key(
        False,
        needs=(MASKS, FILLS_MASKS),
        resume="declared",
        changes="batch",
    )
    """true: every predicted token becomes [MASK] in training, as with `mask_fraction: 1` and `random_fraction: 0`."""

    pack_sequences: bool = key(True, tasks="pretraining", resume="order")
    """true: several documents share a row and each attends to itself only, so that almost no slot is padding.
    false: one document per row."""

    clm_steps: int | None = key(
        None, at_least=1, needs="trainer.objective=mlm", tasks="pretraining", resume="declared", changes="batch"
    )
    """So many steps at the start of the run learn causal language modelling: every token is predicted from those before
    it in its document. Masks, and attention to both sides, follow from that step on. Evaluations are with masks."""

    # Dropout masks have the shape of the batch.
    pad_to_multiple_of: int | None = key(
        None, at_least=1, tasks="pretraining", resume=when("model.dropout_prob", "declared")
    )
    """Without packing: pad a micro-batch to its longest document rounded up to this multiple. null: always to
    `dataset.max_seq_length`, so that shapes never change. Must divide `dataset.max_seq_length`."""

    max_length: int | None = key(None, resume="free")
    """Follows `dataset.max_seq_length`, which decides; another value is a warning and has no effect."""
