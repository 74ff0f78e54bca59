"""Keys of `trainer`: the run itself."""

from dataclasses import dataclass
from typing import Literal

from neobert.config.schema_data import FILLS_MASKS, MASKS, PREDICTS_TOKENS
from neobert.key import key, when

TRACKER_NAMES = ("wandb", "tensorboard", "trackio", "mlflow")
"""Of `trainer.report_to`, beside none and all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerSection:
    """The run. Exactly one of `max_steps`, `max_tokens` and `num_train_epochs` is its budget."""

    objective: Literal["mlm", "replaced_token", "clm", "mlm_jepa", "distill"] = key(
        "mlm", tasks="pretraining", resume="fixed"
    )
    """What pretraining learns. mlm: to predict hidden tokens. replaced_token: to find the tokens that were replaced by
    random ones, the discriminator's task of ELECTRA; `datacollator.mlm_probability` is the rate. clm: to predict the
    next token, under causal attention; a start for a run with mlm (`model.init_from`), see `datacollator.clm_steps`.
    mlm_jepa: mlm, and to predict the hidden states that the moving average of the encoder (`ema_decay`) has without
    masks. distill: mlm and the outputs of a trained encoder, see `distill`."""

    jepa_weight: float = key(1.0, above=0, needs="trainer.objective=mlm_jepa", resume="declared")
    """With mlm_jepa: what the distance of a predicted hidden state (1 - cosine) counts beside the loss of a token."""

    # It decides which weights the optimizer has.
    trained_weights: Literal["all", "embeddings"] = key(
        "all", tasks="pretraining", needs="trainer.objective=mlm|clm", resume="fixed"
    )
    """embeddings: only the rows of tokens learn (the embedding, an untied vocabulary projection, its bias), and the
    rest of the model stays as it is: a first phase for new tokens."""

    # A run may grow: what follows its length, the schedule and the final masked fraction, follows the new one.
    max_steps: int | None = key(None, at_least=1, resume="schedule")
    """Budget in optimizer steps."""

    max_tokens: int | None = key(None, at_least=1, tasks="pretraining", resume="schedule")
    """Budget in row slots (padding included): steps = ceil(max_tokens / (global batch in rows * max_seq_length))."""

    num_train_epochs: float | None = key(None, above=0, resume="schedule")
    """Budget in passes over the data; the source's number of tokens must be known."""

    # Dropout masks are drawn, and rows that need not be full are packed, by micro-batch.
    per_device_train_batch_size: int | Literal["auto"] = key(
        16, at_least=1, resume=when("model.dropout_prob or trainer.enforce_full_packed_batches=false", "declared")
    )
    """Rows of one micro-batch on one device. auto: the most that fit in memory and divide `global_batch_size`, which
    must be set; the run writes the number into its config."""

    # `eval_max_batches` counts these batches.
    per_device_eval_batch_size: int = key(
        32,
        at_least=1,
        tasks="pretraining finetune glue",
        resume=when("trainer.eval_max_batches", "declared"),
        changes="evaluation",
    )
    """Rows of one evaluation batch on one device."""

    # The rows of a step are compared as `global_batch_size`, however they are written.
    gradient_accumulation_steps: int | None = key(None, at_least=1, resume="free")
    """Micro-batches per optimizer step; null is 1, or what `global_batch_size` asks for. Rows per step =
    `per_device_train_batch_size` x this x processes."""

    global_batch_size: int | None = key(None, at_least=1, resume="declared", changes="batch")
    """Rows per optimizer step over all processes; derives the accumulation, which must then be null."""

    batch_size_warmup_start: int | None = key(
        None,
        at_least=1,
        needs="trainer.batch_size_warmup_steps",
        tasks="pretraining",
        resume="declared",
        changes="batch",
    )
    """Rows of the first step, over all processes, when the batch grows to its full size; a multiple of
    `per_device_train_batch_size` x processes. null: the full batch from the first step on."""

    batch_size_warmup_steps: int | None = key(
        None,
        at_least=1,
        needs="trainer.batch_size_warmup_start",
        tasks="pretraining",
        resume="declared",
        changes="batch",
    )
    """Step at which the batch has its full size. It grows evenly, by the greatest common divisor of
    `batch_size_warmup_start` and the full batch; the micro-batch stays and the accumulation grows."""

    enforce_full_packed_batches: bool = key(True, tasks="pretraining", resume="order")
    """With packing. true: every micro-batch is `per_device_train_batch_size` full rows. false: each micro-batch packs
    that many documents, without looking ahead, into as many rows as they need."""

    output_dir: str = key("outputs/neobert", path=True, machine=True, resume="free")
    """The run's folder: config, logs and checkpoints."""

    overwrite_output_dir: bool = key(False, resume="free")
    """Start again in a folder that holds a run; the old run is renamed aside. Without it that is an error, and so is a
    folder with `checkpoints` in it that is no run's."""

    resume_from_checkpoint: str | None = key(None, path=True, resume="free")
    """`latest` (or true, auto), a step, or the path of a checkpoint; null (or false) starts fresh. `latest` with no
    checkpoint there starts fresh and says so; with damaged ones it takes the newest that is whole."""

    resume_allow: tuple[str, ...] = key((), resume="free")
    """Keys that may differ from the checkpoint's on resume although they change what is learned, for example
    `[dataset.max_seq_length, optimizer.weight_decay]`. The error of a resume names those it needs."""

    save_model: bool = key(True, resume="free")
    """false: write no checkpoint at all, not even at the end."""

    save_strategy: Literal["steps", "no"] = key("steps", resume="free")
    """no: only the checkpoint at the end, as `save_steps: 0`."""

    save_steps: int = key(1000, at_least=0, resume="free")
    """Steps between checkpoints; 0 saves only at the end."""

    save_total_limit: int | None = key(3, at_least=0, resume="free")
    """Newest checkpoints to keep; null or 0 keeps all. Damaged ones do not count."""

    save_milestone_steps: tuple[int, ...] = key(
        (), at_least=1, needs=("trainer.save_model", "trainer.save_strategy=steps"), resume="free"
    )
    """Steps that are saved and kept forever, whatever `save_steps` and `save_total_limit` say."""

    save_milestone_every: int | None = key(
        None, at_least=1, needs=("trainer.save_model", "trainer.save_strategy=steps"), resume="free"
    )
    """Every multiple of this is saved and kept forever; null: none."""

    save_best: bool = key(False, needs=("trainer.save_model", "trainer.save_strategy=steps"), resume="free")
    """Also keep the checkpoint with the best evaluation: the lowest loss, the highest score of `task: contrastive`, the
    best `finetune.metric`. Saves must be evaluated: `save_steps` is a multiple of `eval_steps`."""

    async_save: bool = key(False, needs=("trainer.save_model", "trainer.save_strategy=steps"), resume="free")
    """Copy the state, then write the checkpoint while training continues. Needs memory for one more copy of weights and
    optimizer."""

    eval_strategy: Literal["steps", "no"] = key("steps", resume="free")
    """no: evaluate only at the end, as `eval_steps: 0`."""

    eval_steps: int = key(1000, at_least=0, resume="free")
    """Steps between evaluations; 0 evaluates only at the end."""

    # Losses before and after could not be compared.
    eval_max_batches: int | None = key(None, at_least=1, tasks="pretraining", resume="declared", changes="evaluation")
    """Upper bound of evaluation batches, counted over all devices; null has none."""

    eval_seed: int = key(0, at_least=0, below=2**63, tasks="pretraining", resume="declared", changes="evaluation")
    """Seed of the evaluation masks; they depend on nothing else of the run."""

    logging_steps: int = key(50, at_least=0, resume="free")
    """Steps between log lines; 0 never logs training."""

    report_to: tuple[str, ...] | None = key(None, machine=True, resume="free")
    """Trackers that get the metrics of `log.jsonl` too: none, all that are installed, or some of wandb, tensorboard,
    trackio and mlflow, as one name or a list. null: none, or wandb with `wandb.enabled`."""

    log_train_accuracy: bool = key(False, tasks="pretraining", resume="free")
    """Log the fraction of masked tokens predicted exactly; costs an arg-max over the vocabulary."""

    log_grad_norm: bool = key(True, resume="free")
    """Log the gradient's L2 norm before clipping."""

    log_weight_norms: bool = key(True, resume="free")
    """Log the L2 norm of all weights with every log line."""

    health_checks: bool = key(True, resume="free")
    """Look at loss, gradients, learning rate, masks, sources, speed and memory at log lines and evaluations, and say
    once what is odd, with a line of advice (docs/troubleshooting.md lists the checks); nothing is stopped. false: look
    at nothing."""

    log_statistics: bool = key(False, needs="trainer.logging_steps", tasks="pretraining", resume="free")
    """Log gradient norms and weight norms by kind of weight, and the logsumexp of the logits, with every log line."""

    gradient_checkpointing: bool = key(False, resume="free")
    """Recompute each block's activations in the backward pass: less memory, about a third more time."""

    gradient_checkpointing_every: int = key(1, at_least=1, needs="trainer.gradient_checkpointing", resume="free")
    """With `gradient_checkpointing`: recompute every k-th block only; 1 is all of them."""

    gradient_clipping: float | None = key(1.0, above=0, because="null never clips", resume="declared")
    """Clip the gradient's L2 norm to this; null never clips."""

    # Free, as tf32, kernels and compile: the same computation, rounded differently.
    mixed_precision: Literal["no", "bf16", "auto"] = key("bf16", resume="free")
    """bf16 computes in bfloat16 and keeps weights in float32; no computes in float32. fp32 and false are read as no,
    true as bf16. auto: bf16 where the GPU has it; on a CPU, where its matrix products are measured to be faster. The
    run writes the choice into its config, and a resumed run keeps it."""

    # Free, as mixed_precision is: checkpoints hold the fp32 weights with and without it.
    bf16_residual: bool = key(False, needs="trainer.mixed_precision=bf16", resume="free")
    """Compute without autocast: with a bf16 copy of the weights and a bf16 residual stream, and the fp32 weights in
    optimizer and checkpoints. Norms, softmax and loss stay fp32 inside, and so do sums of gradients. For a GPU; several
    processes reduce gradients after the backward pass, not beside it."""

    # Not free: an operand has 4 significant bits, and what is learned with it is something else.
    fp8: Literal["no", "rowwise", "emulated"] = key("no", needs="trainer.mixed_precision=bf16", resume="declared")
    """Products of `qkv`, `gate_up` (`up`) and `down` in fp8, forward and backward, with a scale for each row; the sizes
    of the model must be multiples of 16. rowwise: on a GPU of compute capability 8.9 or later. emulated: the same
    rounding anywhere, slowly, to see what it does to a loss. no: in bf16."""

    tf32: bool = key(True, resume="free")
    """Allow TF32 in float32 matrix products on CUDA."""

    masked_logits_only_loss: bool = key(True, tasks="pretraining", needs=PREDICTS_TOKENS, resume="free")
    """true: vocabulary logits are computed for masked tokens only. false: for all tokens, slower, for comparison."""

    z_loss: float = key(
        0.0,
        at_least=0,
        needs=(MASKS, PREDICTS_TOKENS),
        resume="declared",
    )
    """Coefficient z of z * logsumexp(logits)^2 in the training loss of every target, which keeps logits small; 1e-4 is
    usual, 0 is off. Evaluation leaves it out."""

    # The average is saved with the weights.
    ema_decay: float | None = key(None, above=0, below=1, resume="declared")
    """Keep an exponential moving average of the weights beside them, with this decay per step (0.999 looks back over
    about 1,000 steps): evaluated as `eval_ema`, saved as `ema.safetensors`. Costs one more copy of the weights. null
    keeps none."""

    ema_start_step: int = key(0, at_least=0, needs="trainer.ema_decay", resume="declared")
    """With `ema_decay`: the average starts with the weights after this step."""

    torch_compile: bool | None = key(None, resume="free")
    """Compile the model with torch.compile. null: on a GPU, in fine-tuning only with `torch_compile_dynamic: true`; not
    on a CPU."""

    torch_compile_backend: Literal["inductor", "aot_eager", "eager"] = key("inductor", resume="free")
    """Backend of torch.compile."""

    torch_compile_dynamic: bool | None = key(None, resume="free")
    """Compile for changing shapes; null is false, because shapes are constant here."""

    device: Literal["auto", "cpu", "cuda", "mps"] = key("auto", resume="free")
    """Where to train. auto: on the GPU when there is one, else on the CPU; a GPU that torch cannot use is an error.
    cuda: a GPU of NVIDIA, or of AMD with a ROCm build of torch. mps: a GPU of Apple. ROCm and mps were never tried."""

    use_cpu: bool = key(False, resume="free")
    """true: the same as `device: cpu`, whose older form it is."""

    # Free: the same computation, with sums over processes in another order.
    parallel: Literal["auto", "ddp", "fsdp2", "hsdp"] = key("auto", resume="free")
    """How several processes train one model. ddp: each keeps all of it (DistributedDataParallel). fsdp2: each keeps a
    part of weights, gradients and optimizer state, and gathers a block when it computes (`fully_shard`). hsdp: the same
    within groups of `shard_size` processes, and the groups are copies. auto: ddp."""

    shard_size: int | None = key(None, at_least=1, needs="trainer.parallel=hsdp", resume="free")
    """Processes that share one copy of the model; null: those of a machine."""

    reshard_after_forward: bool = key(True, needs="trainer.parallel=fsdp2|hsdp", resume="free")
    """true: a block is freed after its forward pass and gathered again in the backward. false: it is kept, which takes
    memory for all blocks and saves one gather."""

    cpu_threads: int | None = key(None, at_least=1, machine=True, resume="free")
    """Threads that compute on a CPU; null is OMP_NUM_THREADS, or else what this process may use by its affinity and by
    the quota of its container."""

    console: Literal["auto", "plain", "quiet"] = key("auto", machine=True, resume="free")
    """What is printed. auto: on a terminal a table of the settings, a progress bar and lines; lines alone in a pipe, in
    CI, with NO_COLOR and with TERM=dumb. plain: lines alone. quiet: warnings and errors alone. `training.log` has every
    line."""

    disable_tqdm: bool = key(False, machine=True, resume="free")
    """Show no progress bar."""

    # Which steps count, and where training continues after bad ones, decides what is learned.
    max_bad_steps: int = key(5, at_least=1, resume="declared")
    """Stop with exit code 76 after so many skipped steps in a row, or when more than 1% of the last 1,000 steps were
    skipped. A step is skipped when the loss or the gradient is not finite, or by `skip_spikes`."""

    skip_spikes: float | None = key(None, above=0, resume="declared")
    """Also skip a step whose loss or gradient norm is more than this many standard deviations above the mean of the
    last 128 steps that were not skipped (6 is usual); null skips none."""

    rollback_steps: int | None = key(
        None,
        at_least=1,
        needs=("trainer.save_model", "trainer.save_strategy=steps", "trainer.save_steps"),
        resume="declared",
    )
    """When `max_bad_steps` is reached: go back to the newest checkpoint at least this many steps old and skip the
    rows trained on since, at most 3 times in a run; null stops the run instead."""

    detect_anomaly: bool = key(False, resume="free")
    """Check the result of every operation of the backward pass and stop at the first that is not a number; slow."""

    max_hours: float | None = key(None, above=0, resume="free")
    """Save and stop with exit code 75 before this many hours have passed since the start; null has no limit."""

    rank_timeout_seconds: float | None = key(600.0, above=0, resume="free")
    """With several processes: end all with exit code 69 and a sentence that names the one that gives no sign of life
    for so long, or keeps the others waiting for so long in a step. It may take as long as it likes to start, to save
    and to evaluate, while it lives. null waits until the collectives of torch time out."""

    replay_audit: Literal["warn", "strict"] = key("warn", resume="free")
    """Steps made again after a crash are compared with `log.jsonl`. warn: a difference is reported. strict: it stops
    the run."""

    deterministic: bool = key(False, resume="free")
    """Use only operations that give the same bits every time; slower on a GPU, already so on a CPU."""

    profiler_steps_start: int | None = key(None, at_least=1, needs="trainer.profiler_steps", resume="free")
    """First step (from 1, as in the log) that torch's profiler records; with `profiler_steps`. Leave it some steps to
    warm up."""

    profiler_steps: int = key(0, at_least=0, needs="trainer.profiler_steps_start", resume="free")
    """Steps to profile; 0 profiles nothing. Process 0 writes `profiler_trace.json` into `output_dir`, and on CUDA
    `snapshot.pickle`, the history of the allocator."""

    probe_steps: int | None = key(None, at_least=1, resume="free")
    """Steps between probes of the encoder, also at the start and at the end: on `probe_sets` the accuracy of nearest
    neighbours and of ridge regression, or Spearman's correlation; in pretraining also the held-out loss by frequency,
    position and class of word (docs/evaluation.md). null probes nothing."""

    probe_sets: tuple[str, ...] = key((), path=True, needs="trainer.probe_steps", resume="free")
    """Labelled files to probe with, JSONL, CSV, TSV or Parquet: columns text (or sentence) and label, or sentence1,
    sentence2 and score (or label). Examples must not overlap, and are cut at `dataset.max_seq_length`."""

    probe_examples: int = key(400, at_least=10, needs="trainer.probe_sets", resume="free")
    """Most examples of a set; which ones is a function of their texts and `probe_seed`."""

    probe_seed: int = key(0, at_least=0, needs="trainer.probe_sets", resume="free")
    """Chooses the examples of a set."""

    probe_tokens: int = key(16384, at_least=1, tasks="pretraining", needs="trainer.probe_steps", resume="free")
    """Tokens of the evaluation over which the loss is split, about."""

    fill_mask_texts: tuple[str, ...] | None = key(
        None, needs=FILLS_MASKS, tasks="pretraining contrastive", resume="free"
    )
    """Texts with [MASK] that the model completes at the end of the run. null takes the starts of the first
    evaluation documents and hides one token of each; `[]` shows none."""

    @property
    def means_cpu(self) -> bool:
        """Whether no GPU may be used."""
        return self.use_cpu or self.device == "cpu"

    @property
    def micro_batch_rows(self) -> int:
        """`per_device_train_batch_size` as a number.

        Raises:
            ValueError: it is auto still; the config of a run holds the number that was chosen.
        """
        if self.per_device_train_batch_size == "auto":
            raise ValueError("trainer.per_device_train_batch_size: auto is not chosen yet; write a number")
        return self.per_device_train_batch_size
