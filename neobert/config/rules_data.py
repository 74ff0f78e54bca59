"""Rules about `dataset`, `tokenizer`, `datacollator` and `contrastive`; see `rules`."""

from collections.abc import Iterator

from neobert.config.fields import FIELDS
from neobert.config.schema import Config
from neobert.config.schema_contrastive import PairSource

SOURCES = ("dataset.path", "dataset.mixture", "dataset.name")
"""What names the training data; the first that is set decides."""

OF_HUB_SOURCE = ("dataset.config", "dataset.revision")
"""Details of a `dataset.name`."""

HELD_OUT = ("dataset.eval_samples", "dataset.validation_split")
"""At most one of these is set."""

FORMS = {"infonce": "pairs", "cosent": "scored pairs", "supcon": "labelled texts"}
"""What a loss needs, of those that do not take everything."""


def check_dataset(config: Config) -> Iterator[str]:
    """What is read, and how."""
    data = config.dataset
    if config.task in ("contrastive", "glue"):
        return  # See check_contrastive; the tasks of GLUE are no key of this section.
    if data.name is None and data.path is None and not data.mixture:
        yield (
            "dataset.name: nothing to train on; name a dataset of the hub, python_stdlib, or a local file or folder"
            " with dataset.path"
        )
    yield from _check_mixture(config)
    yield from _check_reading(config)
    if data.name == "python_stdlib" and data.path is None and not data.mixture:
        for key in OF_HUB_SOURCE:
            if FIELDS[key].value_in(config) is not None:
                yield f"{key}: {FIELDS[key].value_in(config)!r} has no meaning for python_stdlib; remove it"
    for key in ("dataset.train_split", "dataset.eval_split"):
        value = FIELDS[key].value_in(config)
        if value is not None and "+" in value:
            yield (
                f"{key}: {value!r} is a sum of splits, which is not read; name one split or slice, or list the sources"
                " in dataset.mixture"
            )
    if config.task == "pretraining" and data.min_length >= data.max_seq_length >= 1:
        yield (
            f"dataset.min_length: {data.min_length} would drop every document; it must be less than"
            f" dataset.max_seq_length = {data.max_seq_length}"
        )


def _check_mixture(config: Config) -> Iterator[str]:
    mixture = config.dataset.mixture
    for number, source in enumerate(mixture):
        key = f"dataset.mixture: [{number}]"
        if source.name is None and source.path is None:
            yield f"{key} names no source; give it a name (hub) or a path"
        elif source.name is not None and source.path is not None:
            yield f"{key}.name: {source.name!r} is set beside path: {source.path!r}; keep one of them"
    without = [number for number, source in enumerate(mixture) if source.weight is None]
    if without and len(without) < len(mixture):
        yield (
            f"dataset.mixture: [{without[0]}].weight: is not set, but another source has a weight; give every one a"
            " weight, or none, which reads each document once per epoch"
        )
    epochs = config.trainer.num_train_epochs
    weighted = "dataset.mixture_alpha" if config.dataset.mixture_alpha is not None else "a weight in dataset.mixture"
    if epochs is not None and mixture and (config.dataset.mixture_alpha is not None or not without):
        yield (
            f"trainer.num_train_epochs: {epochs} has no meaning with {weighted}, which decides how often a source is"
            " read; write trainer.max_steps or trainer.max_tokens"
        )
    if config.dataset.mixture_alpha is not None and config.dataset.streaming:
        yield (
            f"dataset.streaming: true beside dataset.mixture_alpha = {config.dataset.mixture_alpha}, which needs the"
            " number of tokens of every source; write false"
        )


def _check_reading(config: Config) -> Iterator[str]:
    data = config.dataset
    if data.shuffle_buffer_size is not None:
        for key in ("dataset.num_lanes", "dataset.window_documents"):
            value = FIELDS[key].value_in(config)
            if value is not None:
                yield (
                    f"dataset.shuffle_buffer_size: {data.shuffle_buffer_size} is set beside {key} = {value}, which it"
                    " derives; write null for one of the two"
                )
    if data.pre_tokenize and data.streaming:
        yield "dataset.pre_tokenize: true tokenises to disk, but dataset.streaming is true; write null for one of them"
    if data.validation_split is not None and data.eval_samples is not None:
        yield (
            f"dataset.validation_split: {data.validation_split} is set beside dataset.eval_samples ="
            f" {data.eval_samples}; both hold documents out, write null for one of the two"
        )


def check_tokenizer(config: Config) -> Iterator[str]:
    """Which tokenizer, and whether it is trained."""
    tokenizer = config.tokenizer
    named = [(k, FIELDS[k].value_in(config)) for k in ("tokenizer.name", "tokenizer.path")]
    if tokenizer.train:
        for key, value in named:
            if value is not None:
                yield f"{key}: {value!r} names a tokenizer, but tokenizer.train is true; write null for one of the two"
    else:
        from_checkpoint = {
            "contrastive": config.contrastive.pretrained_checkpoint_dir,
            "finetune": config.finetune.model,
            "glue": config.glue.model,
        }.get(config.task)
        others = (from_checkpoint, config.model.init_from, config.distill.teacher)
        if all(value is None for _, value in named) and all(source is None for source in others):
            yield (
                "tokenizer.name: no tokenizer; name one of the hub, a folder with tokenizer.path, or write"
                " tokenizer.train: true, or model.init_from for that of its weights"
            )
    size, rows = tokenizer.vocab_size, config.model.vocab_size
    if size is not None and tokenizer.algorithm == "byte_bpe" and 16 <= size < 261:
        yield f"tokenizer.vocab_size: {size} is less than the 256 bytes and 5 special tokens that byte_bpe starts with"
    if size is not None and rows is not None and rows < size:
        yield f"model.vocab_size: {rows} is less than tokenizer.vocab_size = {size}; write null to follow the tokenizer"


def check_rows(config: Config) -> Iterator[str]:
    """How rows are padded."""
    multiple, length = config.datacollator.pad_to_multiple_of, config.dataset.max_seq_length
    if multiple is not None and multiple >= 1 and length % multiple:
        yield f"datacollator.pad_to_multiple_of: {multiple} does not divide dataset.max_seq_length = {length}"


_MASK_KEYS = (
    "datacollator.mlm_probability",
    "datacollator.mlm_probability_final",
    "datacollator.eval_mlm_probability",
    "datacollator.mask_units",
)


def check_masks(config: Config) -> Iterator[str]:
    """Which tokens are predicted, and what becomes of them."""
    masks = config.datacollator
    if config.trainer.objective == "clm":
        for key in _MASK_KEYS:
            if (value := FIELDS[key].value_in(config)) != FIELDS[key].default:
                yield (
                    f"{key}: {value} has no effect with trainer.objective: clm, which masks nothing; remove it, or"
                    f" write the default, {FIELDS[key].default}"
                )
    lowest, highest = masks.mlm_rate_range
    if lowest > highest:
        yield f"datacollator.mlm_rate_range: [{lowest}, {highest}] must be the smallest fraction, then the largest"
    if masks.clm_steps is not None and config.trainer.skip_spikes is not None:
        yield (
            f"trainer.skip_spikes: {config.trainer.skip_spikes} compares losses of successive steps, which are of two"
            " kinds with datacollator.clm_steps; write null for it"
        )
    if masks.mask_weights == "adaptive" and config.trainer.parallel in ("fsdp2", "hsdp"):
        yield (
            f"trainer.parallel: {config.trainer.parallel} shards the weights, and datacollator.mask_weights: adaptive"
            " asks the whole model which tokens it predicts; write ddp"
        )
    if masks.mask_all or not all(0 <= fraction <= 1 for fraction in (masks.mask_fraction, masks.random_fraction)):
        return
    if masks.mask_fraction + masks.random_fraction > 1 + 1e-9:
        yield (
            f"datacollator.random_fraction: {masks.random_fraction} + datacollator.mask_fraction ="
            f" {masks.mask_fraction} is more than 1; lower one of them, the rest of the predicted tokens is kept"
        )
    if masks.mask_fraction + masks.random_fraction == 0:
        yield (
            "datacollator.mask_fraction: 0 beside datacollator.random_fraction = 0 keeps every predicted token as"
            " it is, so there is nothing to learn; raise one of them"
        )


def check_jepa(config: Config) -> Iterator[str]:
    """What an objective needs that learns from the moving average of the weights."""
    trainer = config.trainer
    if trainer.objective != "mlm_jepa":
        return
    if trainer.ema_decay is None:
        yield "trainer.ema_decay: null, but trainer.objective: mlm_jepa learns from the average; write 0.99, say"
    elif trainer.ema_start_step:
        yield (
            f"trainer.ema_start_step: {trainer.ema_start_step}, but trainer.objective: mlm_jepa learns from the average"
            " from the first step on; write 0"
        )
    if trainer.z_loss:
        yield f"trainer.z_loss: {trainer.z_loss} is no part of the loss of trainer.objective: mlm_jepa; write 0"
    if trainer.parallel in ("fsdp2", "hsdp"):
        yield (
            f"trainer.parallel: {trainer.parallel} shards the average, which trainer.objective: mlm_jepa computes with;"
            " write ddp"
        )
    if trainer.bf16_residual:
        yield (
            "trainer.bf16_residual: true computes with copies of the weights, and trainer.objective: mlm_jepa with"
            " their average; write false"
        )


def check_contrastive(config: Config) -> Iterator[str]:
    """Everything about pairs."""
    if config.task != "contrastive":
        return
    yield from _check_folder(config)
    yield from _check_dims(config)
    yield from _check_start(config)
    yield from _check_objective(config)
    for name in ("sets", "eval_sets"):
        for number, source in enumerate(FIELDS[f"contrastive.{name}"].value_in(config)):
            yield from _check_source(f"contrastive.{name}: [{number}]", source)


def _check_folder(config: Config) -> Iterator[str]:
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


def _check_dims(config: Config) -> Iterator[str]:
    dims = config.contrastive.matryoshka_dims
    if len(set(dims)) < len(dims):
        yield f"contrastive.matryoshka_dims: {list(dims)} must be different widths"


def _check_start(config: Config) -> Iterator[str]:
    section = config.contrastive
    if section.pretrained_checkpoint_dir is None:
        if not section.allow_random_weights:
            yield (
                "contrastive.pretrained_checkpoint_dir: null leaves the encoder at random weights; name the run,"
                " checkpoint or exported folder to start from, or write contrastive.allow_random_weights: true"
            )
    elif section.allow_random_weights:
        yield (
            "contrastive.allow_random_weights: true is set beside contrastive.pretrained_checkpoint_dir ="
            f" {section.pretrained_checkpoint_dir}; keep one of them"
        )
    step = section.pretrained_checkpoint
    if step != "latest" and not step.isdecimal():
        yield f"contrastive.pretrained_checkpoint: {step} is neither a step nor latest"


def _check_objective(config: Config) -> Iterator[str]:
    section = config.contrastive
    mixed = section.pretraining_prob > 0
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


def _check_source(name: str, source: PairSource) -> Iterator[str]:
    if source.name is None:
        yield f"{name} names no set; give it a name"
    if source.score_column is not None and source.label_column is not None:
        yield f"{name}.score_column: {source.score_column!r} is set beside label_column; a set has one of them"
    for key in ("positive_column", "negative_columns"):
        beside = "label_column" if source.label_column is not None else "score_column"
        takes_it = source.label_column is None and (key == "positive_column" or source.score_column is None)
        if getattr(source, key) is not None and not takes_it:
            yield f"{name}.{key}: {getattr(source, key)} has no effect beside {beside}; remove one of them"
