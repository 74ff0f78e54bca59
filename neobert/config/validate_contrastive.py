"""Rules about contrastive fine-tuning; see `validate`."""

from collections.abc import Iterator

from neobert.config.fields import FIELDS
from neobert.config.schema import Config
from neobert.config.schema_contrastive import PairSource

OF_CONTRASTIVE = ("dataset.alpha", "dataset.load_all_from_disk", "dataset.force_redownload")
"""Keys outside of its section that nothing else reads."""

WITHOUT_EFFECT = (
    "model.init_drop_decoder_bias",
    "dataset.config",
    "dataset.revision",
    "dataset.mixture",
    "dataset.streaming",
    "dataset.pre_tokenize",
    "dataset.pre_tokenize_output",
    "dataset.text_column",
    "dataset.sample_by",
    "dataset.train_split",
    "dataset.eval_split",
    "dataset.validation_split",
    "dataset.min_length",
    "dataset.num_lanes",
    "dataset.window_documents",
    "dataset.shuffle_buffer_size",
    "dataset.max_document_chars",
    "dataset.on_bad_shard",
    "dataset.network_retries",
    "dataset.num_proc",
    "dataset.cache_dir",
    "tokenizer.train",
    "tokenizer.truncation",
    "datacollator.pack_sequences",
    "datacollator.pad_to_multiple_of",
    "datacollator.eval_mlm_probability",
    "datacollator.mlm_probability_final",
    "datacollator.mlm_probability_final_step",
    "optimizer.muon_config.capture_last_microbatch_only",
    "trainer.objective",
    "trainer.batch_size_warmup_start",
    "trainer.batch_size_warmup_steps",
    "trainer.log_statistics",
    "trainer.max_tokens",
    "trainer.enforce_full_packed_batches",
    "trainer.eval_max_batches",
    "trainer.eval_seed",
    "trainer.per_device_eval_batch_size",
    "trainer.log_train_accuracy",
    "trainer.masked_logits_only_loss",
)
"""Keys of pretraining that contrastive fine-tuning does not read."""

OF_MASKING = (
    "datacollator.mlm_probability",
    "datacollator.mask_all",
    "datacollator.mask_units",
    "datacollator.mask_fraction",
    "datacollator.random_fraction",
    "datacollator.span_max_words",
    "trainer.z_loss",
)
"""Keys of pretraining that steps of `contrastive.pretraining_objective: mlm` read."""

FORMS = {"infonce": "pairs", "cosent": "scored pairs", "supcon": "labelled texts"}
"""What a loss needs, of those that do not take everything."""


def check_contrastive(config: Config) -> Iterator[str]:
    """Keys that belong to the other task, and everything about pairs."""
    if config.task != "contrastive":
        for key, field in FIELDS.items():
            if key.startswith("contrastive.") or key in OF_CONTRASTIVE:
                default = () if key in ("contrastive.sets", "contrastive.eval_sets") else field.default
                if field.value_in(config) != default:
                    yield f"{key}: is read with task: contrastive only; write that, or remove the key"
        return
    for key in WITHOUT_EFFECT:
        if FIELDS[key].value_in(config) != FIELDS[key].default:
            yield f"{key}: {FIELDS[key].value_in(config)} has no effect with task: contrastive; remove it"
    yield from _check_place(config)
    yield from _check_numbers(config)
    yield from _check_start(config)
    yield from _check_objective(config)
    for name in ("sets", "eval_sets"):
        for number, source in enumerate(FIELDS[f"contrastive.{name}"].value_in(config)):
            yield from _check_source(f"contrastive.{name}: [{number}]", source)


def _check_place(config: Config) -> Iterator[str]:
    data = config.dataset
    if not isinstance(data.path, str):
        yield (
            f"dataset.path: {data.path} must be the one folder that scripts/contrastive/preprocess.py writes to, for"
            " example tokenized_data/contrastive"
        )
    if data.name is not None and config.contrastive.sets:
        yield f"dataset.name: {data.name} is set beside contrastive.sets, which replaces it; keep one of them"
    if data.load_all_from_disk and data.force_redownload:
        yield "dataset.force_redownload: true is set beside dataset.load_all_from_disk: true, which fetches nothing"


def _check_numbers(config: Config) -> Iterator[str]:
    section = config.contrastive
    for key, low in (("temperature", 0.01), ("num_hard_negatives", 0)):
        value = getattr(section, key)
        if value < low:
            yield f"contrastive.{key}: {value} must be at least {low}"
    if not 0 <= section.pretraining_prob < 1:
        yield f"contrastive.pretraining_prob: {section.pretraining_prob} must be at least 0 and less than 1"
    if section.false_negative_margin is not None and section.false_negative_margin < 0:
        yield (
            f"contrastive.false_negative_margin: {section.false_negative_margin} must not be negative; null keeps all"
            " negatives"
        )
    if config.dataset.alpha < 0:
        yield f"dataset.alpha: {config.dataset.alpha} must not be negative; 0 draws all sets equally often"
    dims = section.matryoshka_dims
    if any(dim < 1 for dim in dims) or len(set(dims)) < len(dims):
        yield f"contrastive.matryoshka_dims: {list(dims)} must be different widths of at least 1"


def _check_start(config: Config) -> Iterator[str]:
    section = config.contrastive
    if section.pretrained_checkpoint_dir is None:
        if not section.allow_random_weights:
            yield (
                "contrastive.pretrained_checkpoint_dir: null leaves the encoder at random weights; name the run,"
                " checkpoint or exported folder to start from, or write contrastive.allow_random_weights: true"
            )
        if section.pretrained_checkpoint != "latest":
            yield (
                f"contrastive.pretrained_checkpoint: {section.pretrained_checkpoint} belongs to"
                " contrastive.pretrained_checkpoint_dir, which is null; remove it"
            )
    elif section.allow_random_weights:
        yield (
            "contrastive.allow_random_weights: true is set beside contrastive.pretrained_checkpoint_dir ="
            f" {section.pretrained_checkpoint_dir}; keep one of them"
        )
    word = section.pretrained_checkpoint
    if word != "latest" and not word.isdecimal():
        yield f"contrastive.pretrained_checkpoint: {word} is neither a step nor latest"


def _check_objective(config: Config) -> Iterator[str]:
    section = config.contrastive
    mixed = section.pretraining_prob > 0
    if mixed and section.pretraining_dataset is None:
        yield (
            f"contrastive.pretraining_prob: {section.pretraining_prob} needs contrastive.pretraining_dataset; name a"
            " file, a folder or a dataset of the hub, or write 0"
        )
    if not mixed and section.pretraining_dataset is not None:
        yield (
            f"contrastive.pretraining_dataset: {section.pretraining_dataset} is never read with"
            " contrastive.pretraining_prob: 0; raise that, or remove this key"
        )
    if not mixed and section.pretraining_objective != "simcse":
        yield (
            f"contrastive.pretraining_objective: {section.pretraining_objective} has no effect with"
            " contrastive.pretraining_prob: 0; raise that, or remove this key"
        )
    if not (mixed and section.pretraining_objective == "mlm"):
        for key in OF_MASKING:
            if FIELDS[key].value_in(config) != FIELDS[key].default:
                yield (
                    f"{key}: {FIELDS[key].value_in(config)} has no effect without steps of"
                    " contrastive.pretraining_objective: mlm; remove it"
                )
    simcse = section.loss_type == "simcse" or (mixed and section.pretraining_objective == "simcse")
    if simcse and config.model.dropout_prob == 0:
        key = "loss_type" if section.loss_type == "simcse" else "pretraining_objective"
        yield (
            f"contrastive.{key}: simcse compares two dropout masks of one text, but model.dropout_prob is 0; write"
            " model.dropout_prob: 0.1"
        )
    if config.trainer.skip_spikes is not None and mixed:
        yield (
            f"trainer.skip_spikes: {config.trainer.skip_spikes} compares losses of successive steps, which are of two"
            " kinds with contrastive.pretraining_prob; write null for it"
        )
    if config.trainer.torch_compile and not config.trainer.torch_compile_dynamic:
        yield (
            "trainer.torch_compile_dynamic: the length of a batch is that of its texts, so every batch would"
            " be compiled anew; write true, or trainer.torch_compile: false"
        )


def _check_source(place: str, source: PairSource) -> Iterator[str]:
    if source.name is None:
        yield f"{place} names no set; give it a name"
    if source.score_column is not None and source.label_column is not None:
        yield f"{place}.score_column: {source.score_column!r} is set beside label_column; a set has one of them"
    for key in ("positive_column", "negative_columns"):
        beside = "label_column" if source.label_column is not None else "score_column"
        takes_it = source.label_column is None and (key == "positive_column" or source.score_column is None)
        if getattr(source, key) is not None and not takes_it:
            yield f"{place}.{key}: {getattr(source, key)} has no effect beside {beside}; remove one of them"
    if source.max_pairs is not None and source.max_pairs < 1:
        yield f"{place}.max_pairs: {source.max_pairs} must be at least 1"
