"""Every key of a config file: its name, type, default and meaning. The only list of keys.

A config file has one mapping per section below, plus `task` and `seed`. The text under each field is its
documentation: `--help` and docs/configuration.md are made from it. `neobert.config.load` turns YAML into a `Config`,
which is frozen: a value derived from it lives in the object that derived it.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """The encoder to train. The vocabulary and the padding id come from the tokenizer."""

    name: str | None = None
    """A label: shown in the model summary, and the run's name in wandb when `wandb.name` is null."""

    hidden_size: int = 768
    """Width of the residual stream; a multiple of `num_attention_heads`."""

    num_hidden_layers: int = 12
    """Number of encoder blocks."""

    num_attention_heads: int = 12
    """Attention heads of each block; with `rope` the head width `hidden_size / num_attention_heads` must be even."""

    intermediate_size: int = 3072
    """Width of the feed-forward layer. SwiGLU uses 2/3 of it, rounded up to a multiple of 8, so that both activations
    have about the same number of parameters."""

    max_position_embeddings: int = 1024
    """Longest document the model can read, in tokens; at least `dataset.max_seq_length`."""

    vocab_size: int | None = None
    """Rows of the embedding. null: the tokenizer's size rounded up to a multiple of 128. Smaller than the tokenizer is
    an error, larger is kept."""

    rope: bool = True
    """true: rotary position embeddings; false: learned ones, counted from 0 in every document."""

    rope_theta: float = 10000.0
    """Base of the rotary frequencies; larger values suit longer documents."""

    rms_norm: bool = True
    """true: RMSNorm; false: LayerNorm."""

    hidden_act: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward activation."""

    dropout_prob: float = 0.0
    """Dropout on the outputs of attention and feed-forward layers, never on attention probabilities."""

    norm_eps: float = 1e-5
    """Added to the variance in every norm."""

    embedding_init_range: float = 0.02
    """Embeddings start uniform in (-range, range)."""

    decoder_init_range: float = 0.02
    """Linear layers start uniform in (-range, range)."""

    tie_word_embeddings: bool = True
    """Predict tokens with the embedding matrix itself instead of a second matrix."""

    attn_backend: Literal["auto", "sdpa", "flash_attn_varlen"] = "auto"
    """auto takes `flash_attn_varlen` where it can run (CUDA, bf16) and `sdpa` elsewhere; the log names the choice.
    A backend named here that cannot run is an error."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSection:
    """The optimizer. The defaults are those of the NeoBERT paper."""

    name: Literal["adamw"] = "adamw"
    """AdamW. Embeddings, norms and biases have no weight decay."""

    lr: float = 6e-4
    """Peak learning rate."""

    weight_decay: float = 0.1
    """Decay per step is `lr * weight_decay`."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""

    eps: float = 1e-8
    """Added to the root of the second moment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSection:
    """Learning rate: linear warm-up, then a decay that ends at `final_lr_ratio` and stays there."""

    name: Literal["cosine", "linear"] = "cosine"
    """Form of the decay."""

    warmup_steps: int = 2000
    """Steps until the peak learning rate is reached."""

    warmup_percent: float | None = None
    """Warm-up as a percentage (0 to 100) of `total_steps`; wins over `warmup_steps`."""

    decay_steps: int | None = None
    """The step at which the decay ENDS, counted from the start of the run; null is `total_steps`."""

    decay_percent: float | None = None
    """End of the decay as a percentage (0 to 100) of `total_steps`; wins over `decay_steps`."""

    total_steps: int | None = None
    """What the percentages refer to; null is the number of steps of the run."""

    final_lr_ratio: float = 0.1
    """Learning rate after the decay, as a share of the peak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerSection:
    """The run. Exactly one of `max_steps`, `max_tokens` and `num_train_epochs` is its budget."""

    max_steps: int | None = None
    """Budget in optimizer steps."""

    max_tokens: int | None = None
    """Budget in row slots (padding included): steps = ceil(max_tokens / (global batch in rows * max_seq_length))."""

    num_train_epochs: float | None = None
    """Budget in passes over the data; the source's number of tokens must be known."""

    per_device_train_batch_size: int = 16
    """Rows of one micro-batch on one device."""

    per_device_eval_batch_size: int = 32
    """Rows of one evaluation batch on one device."""

    gradient_accumulation_steps: int | None = None
    """Micro-batches per optimizer step; null is 1, or what `global_batch_size` asks for. Rows per step =
    `per_device_train_batch_size` x this x processes."""

    global_batch_size: int | None = None
    """Rows per optimizer step over all processes; derives the accumulation, which must then be null."""

    enforce_full_packed_batches: bool = True
    """With packing. true: every micro-batch is `per_device_train_batch_size` full rows. false: each micro-batch packs
    that many documents, without looking ahead, into as many rows as they need."""

    output_dir: str = "outputs/neobert"
    """The run's folder: config, logs and checkpoints."""

    overwrite_output_dir: bool = False
    """Start anew in a folder that holds a run; the old run is renamed aside. Without it that is an error."""

    resume_from_checkpoint: str | None = None
    """`latest` (or true, auto), a step, or the path of a checkpoint; null (or false) starts fresh. `latest` with no
    checkpoint there starts fresh and says so."""

    save_model: bool = True
    """false: write no checkpoint at all, not even at the end."""

    save_strategy: Literal["steps", "no"] = "steps"
    """no: only the checkpoint at the end, as `save_steps: 0`."""

    save_steps: int = 1000
    """Steps between checkpoints; 0 saves only at the end."""

    save_total_limit: int | None = 3
    """Newest checkpoints to keep; null or 0 keeps all."""

    eval_strategy: Literal["steps", "no"] = "steps"
    """no: evaluate only at the end, as `eval_steps: 0`."""

    eval_steps: int = 1000
    """Steps between evaluations; 0 evaluates only at the end."""

    eval_max_batches: int | None = None
    """Upper bound of evaluation batches, counted over all devices; null has none."""

    eval_seed: int = 0
    """Seed of the evaluation masks; they depend on nothing else of the run."""

    logging_steps: int = 50
    """Steps between log lines; 0 never logs training."""

    log_train_accuracy: bool = False
    """Log the share of masked tokens predicted exactly; costs an arg-max over the vocabulary."""

    log_grad_norm: bool = True
    """Log the gradient's L2 norm before clipping."""

    log_weight_norms: bool = True
    """Log the L2 norm of all weights with every log line."""

    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more time."""

    gradient_clipping: float | None = 1.0
    """Clip the gradient's L2 norm to this; null never clips."""

    mixed_precision: Literal["no", "bf16"] = "bf16"
    """bf16 computes in bfloat16 and keeps weights in float32; no computes in float32. fp32 and false are read as no,
    true as bf16."""

    tf32: bool = True
    """Allow TF32 in float32 matrix products on CUDA."""

    masked_logits_only_loss: bool = True
    """true: vocabulary logits are computed for masked tokens only. false: for all tokens, slower, for comparison."""

    torch_compile: bool = False
    """Compile the model with torch.compile."""

    torch_compile_backend: Literal["inductor", "aot_eager", "eager"] = "inductor"
    """Backend of torch.compile."""

    torch_compile_dynamic: bool | None = None
    """Compile for changing shapes; null is false, because shapes are constant here."""

    use_cpu: bool = False
    """Train on the CPU even when there is a GPU."""

    disable_tqdm: bool = False
    """Show no progress bar."""

    fill_mask_texts: tuple[str, ...] = ()
    """Texts with [MASK] that the model completes at the end of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbSection:
    """Weights & Biases, an optional second place for the metrics."""

    enabled: bool = False
    """Send metrics to wandb; an error before any work when it is not installed."""

    project: str = "neo-bert"
    """Project name."""

    entity: str | None = None
    """User or team; null is the default of the account."""

    name: str | None = None
    """Run name; null is `model.name`, and without one the name of `trainer.output_dir`."""

    tags: tuple[str, ...] = ()
    """Tags of the run."""

    mode: Literal["online", "offline", "disabled"] = "online"
    """offline writes to `dir` for a later `wandb sync`."""

    dir: str = "logs/wandb"
    """Folder of wandb's own files."""

    resume: Literal["never", "allow", "must", "auto"] = "never"
    """wandb's resume policy."""

    watch: Literal["off", "gradients", "parameters", "all"] = "off"
    """What wandb records as histograms; slows training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole run."""

    task: Literal["pretraining"] = "pretraining"
    """What to do with this file."""

    seed: int = 0
    """Seed of initial weights, data order, masks and dropout."""

    model: ModelSection = field(default_factory=ModelSection)
    dataset: DatasetSection = field(default_factory=DatasetSection)
    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    datacollator: DatacollatorSection = field(default_factory=DatacollatorSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    scheduler: SchedulerSection = field(default_factory=SchedulerSection)
    trainer: TrainerSection = field(default_factory=TrainerSection)
    wandb: WandbSection = field(default_factory=WandbSection)
