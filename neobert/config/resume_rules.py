"""What a resumed run may change: every key is fixed, declared, or free.

Fixed keys decide what the weights mean and must be those of the checkpoint. Declared ones change what is learned from
here on, and are taken when `trainer.resume_allow` names them. All others are free: speed, logging, paths, the schedule
(the learning rate is a function of the step) and the budget.
"""

FIXED = (
    "model.hidden_size",
    "model.num_hidden_layers",
    "model.num_attention_heads",
    "model.intermediate_size",
    "model.vocab_size",
    "model.rope",
    "model.rms_norm",
    "model.hidden_act",
    "model.norm_eps",
    "model.tie_word_embeddings",
    "model.local_attention",
    "model.global_attention_every",
    "model.qk_norm",
    "model.embedding_norm",
    "model.decoder_bias",
    "model.ngpt",
    "model.base_scale",
    "optimizer.name",
    "task",
    "trainer.objective",
)
"""Never change on resume."""

ORDER = (
    "seed",
    "dataset.max_seq_length",
    "dataset.num_lanes",
    "dataset.window_documents",
    "dataset.shuffle_buffer_size",
    "dataset.min_length",
    "dataset.max_document_chars",
    "tokenizer.truncation",
    "datacollator.pack_sequences",
    "trainer.enforce_full_packed_batches",
)
"""Change when declared; another order of rows begins at its first row."""

BATCH_WARMUP = ("trainer.batch_size_warmup_start", "trainer.batch_size_warmup_steps")
"""Rows of a step besides `trainer.global_batch_size`."""

MASKING = (
    "datacollator.mlm_probability",
    "datacollator.mlm_probability_final",
    "datacollator.mask_units",
    "datacollator.span_max_words",
    "datacollator.mask_fraction",
    "datacollator.random_fraction",
    "datacollator.mask_all",
)
"""Which tokens are masked, and how. Not the step at which the final share is reached: like the schedule of the learning
rate, it may follow the length of the run."""

DECLARED = (
    *ORDER,
    "trainer.global_batch_size",
    *BATCH_WARMUP,
    *MASKING,
    "model.dropout_prob",
    "model.max_position_embeddings",
    "model.rope_theta",
    "optimizer.weight_decay",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.decoupled_weight_decay",
    "optimizer.groups.matrices.weight_decay",
    "optimizer.groups.head.weight_decay",
    "optimizer.groups.embeddings.weight_decay",
    "optimizer.groups.vectors.weight_decay",
    "optimizer.muon_config.muon_beta",
    "optimizer.muon_config.nesterov",
    "optimizer.muon_config.muon_decay",
    "optimizer.muon_config.orthogonalization",
    "optimizer.muon_config.ns_steps",
    "optimizer.muon_config.norm_factor",
    "optimizer.muon_config.normuon_beta2",
    "optimizer.muon_config.enable_clipping",
    "optimizer.muon_config.clipping_threshold",
    "optimizer.muon_config.clipping_alpha",
    "optimizer.muon_config.clipping_warmup_steps",
    "optimizer.muon_config.clipping_interval",
    "optimizer.muon_config.capture_last_microbatch_only",
    "trainer.ema_decay",
    "trainer.ema_start_step",
    "dataset.alpha",
    "contrastive.num_hard_negatives",
    "contrastive.pretraining_prob",
    "contrastive.loss_type",
    "contrastive.temperature",
    "contrastive.hard_negative_weight",
    "contrastive.both_directions",
    "contrastive.false_negative_margin",
    "contrastive.matryoshka_dims",
    "contrastive.pooling",
    "contrastive.anchor_prefix",
    "contrastive.positive_prefix",
    "contrastive.pretraining_objective",
)
"""Change when declared in `trainer.resume_allow`. `trainer.global_batch_size` stands for the rows of a step, however
they are written."""

SOURCE = (
    "dataset.path",
    "dataset.mixture",
    "dataset.name",
    "dataset.config",
    "dataset.revision",
    "dataset.streaming",
    "dataset.pre_tokenize",
    "dataset.train_split",
    "dataset.load_all_from_disk",
    "contrastive.sets",
    "contrastive.pretraining_dataset",
)
"""Choose the data: naming another one starts the order of rows at the first row of the new source."""

HELD_OUT = (
    "dataset.eval_samples",
    "dataset.eval_split",
    "dataset.validation_split",
    "dataset.text_column",
    "dataset.sample_by",
    "dataset.max_record_bytes",
)
"""Change which documents train, and nothing else about the data: taken when declared, if they do."""

EVAL_BATCH = "trainer.per_device_eval_batch_size"
"""Changes what is evaluated where `trainer.eval_max_batches` counts its batches: declared then, else free."""

EVALUATION = (
    "dataset.eval_split",
    "dataset.eval_samples",
    "dataset.validation_split",
    "datacollator.eval_mlm_probability",
    "trainer.eval_max_batches",
    "trainer.eval_seed",
    "contrastive.eval_sets",
)
"""Change what is evaluated, so that figures before and after cannot be compared: taken when declared, unless the data
is another one anyway."""

ALLOWED = (*DECLARED, *dict.fromkeys((*HELD_OUT, *EVALUATION)), EVAL_BATCH)
"""What `trainer.resume_allow` may list."""
