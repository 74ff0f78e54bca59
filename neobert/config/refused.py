"""Keys and values that are known but not accepted: each with one sentence that says what to write instead.

Nothing here parses to nothing: an old name, a key without effect and a feature that is not there yet are all errors.
`RENAMED` and `REFUSED` also drive `neobert.config.migrate`, which edits a file accordingly.
"""

RENAMED: dict[str, str] = {
    "dataset.column": "dataset.text_column",
    "dataset.path_to_disk": "dataset.path",
    "dataset.pretraining_prob": "contrastive.pretraining_prob",
    "dataset.tokenizer_name": "tokenizer.name",
    "glue.classifier_dropout": "finetune.classifier_dropout",
    "glue.max_seq_length": "dataset.max_seq_length",
    "glue.num_workers": "dataset.num_workers",
    "glue.pretrained_checkpoint_dir": "glue.model",
    "glue.pretrained_model_path": "glue.model",
    "glue.task_name": "glue.tasks",
    "mixed_precision": "trainer.mixed_precision",
    "model.name_or_path": "model.name",
    "optimizer.hparams.betas": "optimizer.betas",
    "optimizer.hparams.eps": "optimizer.eps",
    "optimizer.hparams.lr": "optimizer.lr",
    "optimizer.hparams.weight_decay": "optimizer.weight_decay",
    "optimizer.muon_config.detect_anomalies": "trainer.detect_anomaly",
    "tokenizer.tokenizer_name_or_path": "tokenizer.name",
    "trainer.dir": "trainer.output_dir",
    "trainer.eval_batch_size": "trainer.per_device_eval_batch_size",
    "trainer.max_ckpt": "trainer.save_total_limit",
    "trainer.seed": "seed",
    "trainer.train_batch_size": "trainer.per_device_train_batch_size",
    "trainer.warmup_steps": "scheduler.warmup_steps",
    "wandb.log_interval": "trainer.logging_steps",
}
"""Old key -> new key; the value keeps its meaning."""

FOREIGN_KEYS: dict[str, str] = {
    "adam_epsilon": "optimizer.eps",
    "batch_size": "trainer.per_device_train_batch_size",
    "bf16": "trainer.mixed_precision",
    "block_size": "dataset.max_seq_length",
    "data_seed": "seed",
    "dataloader_num_workers": "dataset.num_workers",
    "dataset_config_name": "dataset.config",
    "dataset_name": "dataset.name",
    "dataset_path": "dataset.path",
    "dataset_prepared_path": "dataset.pre_tokenize_output",
    "dataset_processes": "dataset.num_proc",
    "epochs": "trainer.num_train_epochs",
    "evaluation_strategy": "trainer.eval_strategy",
    "learning_rate": "optimizer.lr",
    "lr_scheduler": "scheduler.name",
    "lr_scheduler_type": "scheduler.name",
    "max_grad_norm": "trainer.gradient_clipping",
    "max_seq_len": "dataset.max_seq_length",
    "micro_batch_size": "trainer.per_device_train_batch_size",
    "mlm_prob": "datacollator.mlm_probability",
    "num_epochs": "trainer.num_train_epochs",
    "optim": "optimizer.name",
    "preprocessing_num_workers": "dataset.num_proc",
    "run_name": "wandb.name",
    "sample_packing": "datacollator.pack_sequences",
    "seq_length": "dataset.max_seq_length",
    "sequence_len": "dataset.max_seq_length",
    "sequence_length": "dataset.max_seq_length",
    "tokenizer_name": "tokenizer.name",
    "train_file": "dataset.path",
    "wandb_entity": "wandb.entity",
    "wandb_name": "wandb.name",
    "wandb_project": "wandb.project",
}
"""Key names of transformers and axolotl, in any section or in none -> key; the value keeps its meaning."""

EXPLAINED: dict[str, str] = {
    "attn_implementation": "is written model.attn_backend: flash_attn_varlen (or sdpa)",
    "adam_beta1": "is the first number of optimizer.betas",
    "adam_beta2": "is the second number of optimizer.betas",
    "base_model": "is written model.init_from for the weights to start from, tokenizer.name or .path for the tokenizer",
    "datasets": "is written dataset.path, dataset.name or dataset.mixture",
    "deepspeed": "is not supported: its ZeRO stages are trainer.parallel: fsdp2 here; remove it",
    "do_eval": "is not a key: a run evaluates every trainer.eval_steps steps; remove it",
    "do_train": "is not a key: the script trains; remove it",
    "flash_attention": "is written model.attn_backend: flash_attn_varlen (or sdpa)",
    "flash_attn": "is written model.attn_backend: flash_attn_varlen (or sdpa)",
    "fp16": "is refused: write trainer.mixed_precision: bf16 or no",
    "fsdp": "is written trainer.parallel: fsdp2",
    "fsdp_config": "is written trainer.parallel: fsdp2 (or hsdp), with trainer.reshard_after_forward; blocks are the"
    " units",
    "fsdp_transformer_layer_cls_to_wrap": "is not needed: blocks are the units of trainer.parallel: fsdp2; remove it",
    "line_by_line": "is written dataset.sample_by: line",
    "model_name_or_path": "is written model.init_from for the weights to start from, tokenizer.name or .path for the"
    " tokenizer",
    "optimizer_name": "is written optimizer.name",
    "push_to_hub": "is not a key: scripts/export/export_hf.py has --push-to-hub",
    "torch_dtype": "is written trainer.mixed_precision: bf16, no or auto",
    "val_set_size": "is written dataset.eval_samples (a number of documents) or dataset.validation_split (a fraction)",
    "validation_file": "is not a key: name the file validation.jsonl and give its folder as dataset.path",
    "validation_split_percentage": "is written dataset.validation_split, a fraction: 0.05 for 5 percent",
    "warmup_ratio": "is written scheduler.warmup_percent, in percent: 6 for 0.06",
}
"""Names as in `FOREIGN_KEYS` whose values are written in another way -> the rest of a sentence after the key."""

REFUSED: dict[str, str] = {
    "accelerate_config_file": "is not a key: write `accelerate launch --config_file FILE SCRIPT CONFIG`",
    "config_path": "is not a key: give the file as the first argument of the script",
    "dataset.trust_remote_code": "is not supported: datasets no longer run code from the hub; use a dataset of files",
    "debug": "is not a key: lower trainer.max_steps and trainer.logging_steps for a trial run",
    "glue.classifier_init_range": "has no effect: the head starts as the layers of the encoder do; remove it",
    "glue.num_labels": "follows from the task: remove it",
    "glue.preprocessing_num_proc": "has no effect: a task is tokenised in seconds; remove it",
    "glue.pretrained_checkpoint": "is a part of glue.model: RUN/checkpoints/STEP is one checkpoint, RUN its newest one",
    "mteb_batch_size": "is not a key: `neobert mteb RUN` makes its own batches",
    "mteb_overwrite_results": "is not a key: delete the results that `neobert mteb` is to make again",
    "mteb_pooling": "is not a key: `neobert mteb RUN` takes that of the checkpoint, or --pooling",
    "mteb_task_type": "is not a key: write `neobert mteb RUN --task-types STS` (or --tasks, --benchmark)",
    "model.classifier_init_range": "has no effect: the head starts as the layers of the encoder do; remove it",
    "model.flash_attention": "is written model.attn_backend: flash_attn_varlen (or sdpa)",
    "model.from_hub": "is not a key: the path passed to a script says where weights come from",
    "model.pad_token_id": "comes from the tokenizer: remove it",
    "model.pretrained_checkpoint": "is written model.init_from: the folder of the checkpoint",
    "model.pretrained_checkpoint_dir": "is written model.init_from: the folder of the run or checkpoint",
    "model.pretrained_config_path": "is not needed: model.init_from reads the architecture beside the weights",
    "model.pretrained_model_path": "is written model.init_from: the folder of the run or checkpoint",
    "model.use_flash_attention": "is written model.attn_backend: flash_attn_varlen (or sdpa)",
    "model.xformers_attention": "is written model.attn_backend: flash_attn_varlen (or sdpa)",
    "optimizer.muon_config.algorithm": "is an old name: write optimizer.muon_config.orthogonalization",
    "optimizer.muon_config.clipping_layers_mapping": "is not needed: the layers of this model are known; remove it",
    "optimizer.muon_config.polar_express": "is an old name: write optimizer.muon_config.orthogonalization",
    "pretraining_metadata": "is not a key: a run reads what it needs from the checkpoint it starts from",
    "scheduler.num_cycles": "has no effect: the cosine has one half period; remove it",
    "tokenizer.padding": "has no effect: rows are packed, or padded as datacollator.pad_to_multiple_of says; remove it",
    "trainer.early_stopping": "is written finetune.early_stopping, and has no meaning in pretraining: remove it",
    "trainer.greater_is_better": "has no effect: which way a metric is better is known; remove it",
    "trainer.load_best_model_at_end": "has no effect: every checkpoint of the run is kept apart; remove it",
    "trainer.metric_for_best_model": "is written finetune.metric; pretraining compares losses: remove it",
    "trainer.remove_unused_columns": "has no effect: only the text column is read; remove it",
    "use_deepspeed": "is not supported: its ZeRO stages are trainer.parallel: fsdp2 here; remove it",
    "pretrained_checkpoint": "is not a key: write the checkpoint itself, `neobert mteb RUN/checkpoints/STEP`",
    "variables": "are set in the config file only, under `variables:`",
}
"""Key -> the rest of a sentence that starts with it. A key covers everything below it."""

REFUSED_VALUES: dict[str, dict[str, str]] = {
    "model.attn_backend": {
        "flash": "'flash' is written flash_attn_varlen",
        "flash_attn": "'flash_attn' is written flash_attn_varlen",
    },
    "optimizer.name": {
        "muon": "'muon' is written muonclip; optimizer.muon_config.enable_clipping: false is plain Muon",
    },
    "task": {
        "mteb": "MTEB needs no config: write `neobert mteb RUN --tasks ...`",
    },
    "trainer.mixed_precision": {
        "fp16": "fp16 is refused: its small range overflows without loss scaling, which is not done here; write bf16"
        " (same speed and memory, the range of float32) or no",
    },
}
"""Key -> refused value -> sentence."""


def find_renamed(key: str) -> str | None:
    """The key that an unknown one is written as here, with the same value; None when there is none."""
    return RENAMED.get(key) or FOREIGN_KEYS.get(key.rpartition(".")[2])


def find_refusal(key: str) -> str | None:
    """The sentence that refuses `key`, naming it, or None for a key that is not in a table."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in RENAMED:
            return f"{name}: is written {RENAMED[name]} here"
        if name in REFUSED:
            return f"{name}: {REFUSED[name]}"
    return f"{key}: is written {FOREIGN_KEYS[parts[-1]]} here" if parts[-1] in FOREIGN_KEYS else None


def explain_foreign_key(key: str) -> str | None:
    """As `find_refusal`, for the key names of other programs whose values cannot be carried over."""
    name = key.rpartition(".")[2]
    return f"{key}: {EXPLAINED[name]}" if name in EXPLAINED else None


def is_below_known_name(key: str) -> bool:
    """Whether a table holds a key below `key`, so that a mapping under `key` must be looked into."""
    return any(name.startswith(f"{key}.") for table in (RENAMED, REFUSED) for name in table)
