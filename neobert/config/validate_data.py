"""Rules about `dataset`, `tokenizer` and `datacollator`; see `validate`."""

from collections.abc import Iterator

from neobert.config.fields import FIELDS
from neobert.config.schema import Config

SOURCES = ("dataset.path", "dataset.mixture", "dataset.name")
"""What names the training data; the first that is given decides."""

OF_HUB_SOURCE = ("dataset.config", "dataset.revision")
"""Details of a `dataset.name`."""


def check_dataset(config: Config) -> Iterator[str]:
    """What is read, and how."""
    data = config.dataset
    if config.task == "contrastive":
        return  # See validate_contrastive.
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
    if data.min_length >= data.max_seq_length >= 1:
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
        if source.weight is not None and source.weight <= 0:
            yield f"{key}.weight: {source.weight} must be greater than 0; leave a source out by removing it"
        if source.max_documents is not None and source.max_documents < 1:
            yield f"{key}.max_documents: {source.max_documents} must be at least 1"
    without = [number for number, source in enumerate(mixture) if source.weight is None]
    if without and len(without) < len(mixture):
        yield (
            f"dataset.mixture: [{without[0]}].weight: is not set, but another source has a weight; give every one a"
            " weight, or none, which reads each document once per epoch"
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
        from_checkpoint = config.task == "contrastive" and config.contrastive.pretrained_checkpoint_dir is not None
        if all(value is None for _, value in named) and not from_checkpoint:
            yield (
                "tokenizer.name: no tokenizer; name one of the hub, a folder with tokenizer.path, or write"
                " tokenizer.train: true"
            )
        for key in ("tokenizer.vocab_size", "tokenizer.train_documents"):
            value = FIELDS[key].value_in(config)
            if value is not None:
                yield f"{key}: {value} is only for tokenizer.train: true; remove it" + (
                    " (model.vocab_size is the size of the embedding)" if key == "tokenizer.vocab_size" else ""
                )
    if tokenizer.revision is not None and tokenizer.name is None:
        yield f"tokenizer.revision: {tokenizer.revision!r} belongs to tokenizer.name, which is null; remove it"
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
