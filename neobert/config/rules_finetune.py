"""Rules about `finetune`, and about fine-tuning of any kind; see `rules`."""

from collections.abc import Iterator

from neobert.config.schema import Config


def check_finetune(config: Config) -> Iterator[str]:
    """Everything about labels."""
    if config.task != "finetune":
        return
    yield from _check_start(config)
    yield from _check_weights(config)
    section = config.finetune
    if len(set(section.labels)) < len(section.labels):
        yield f"finetune.labels: {list(section.labels)} must be different names"
    if section.kind == "regression" and section.labels:
        yield f"finetune.labels: {list(section.labels)} has no effect with finetune.kind: regression; remove it"
    if len(section.labels) == 1 and section.kind == "classification":
        yield f"finetune.labels: {list(section.labels)} leaves nothing to tell apart; name two or more"
    if section.seeds and len(set(section.seeds)) < len(section.seeds):
        yield f"finetune.seeds: {list(section.seeds)} must be different numbers"
    if section.seeds and config.trainer.resume_from_checkpoint not in (None, "latest"):
        yield (
            f"trainer.resume_from_checkpoint: {config.trainer.resume_from_checkpoint} names one checkpoint, but"
            f" finetune.seeds = {list(section.seeds)} are several runs; write latest"
        )
    if section.early_stopping is not None and (config.trainer.eval_strategy == "no" or not config.trainer.eval_steps):
        yield (
            f"finetune.early_stopping: {section.early_stopping} has no effect without evaluations; set"
            " trainer.eval_steps, or remove it"
        )


def check_shapes(config: Config) -> Iterator[str]:
    """A compiled model meets batches of many lengths in fine-tuning."""
    trainer = config.trainer
    if config.task != "pretraining" and trainer.torch_compile and not trainer.torch_compile_dynamic:
        yield (
            "trainer.torch_compile_dynamic: the length of a batch is that of its texts, so every batch would"
            " be compiled again; write true, or trainer.torch_compile: false"
        )


def _check_start(config: Config) -> Iterator[str]:
    section = config.finetune
    if section.model is None and not section.allow_random_weights:
        yield (
            "finetune.model: null leaves the encoder at random weights; name the run, checkpoint, exported folder or"
            " hub model to start from, or write finetune.allow_random_weights: true"
        )
    elif section.model is not None and section.allow_random_weights:
        yield f"finetune.allow_random_weights: true is set beside finetune.model = {section.model}; keep one of them"


def _check_weights(config: Config) -> Iterator[str]:
    weights, labels = config.finetune.class_weights, config.finetune.labels
    if weights is None or isinstance(weights, str):
        if weights not in (None, "balanced"):
            yield f"finetune.class_weights: {weights!r} is unknown; write null, balanced, or a list such as [1, 2.5]"
        return
    if not all(_is_positive(weight) for weight in weights):
        yield f"finetune.class_weights: {list(weights)} must be numbers above 0"
    if labels and len(weights) != len(labels):
        yield (
            f"finetune.class_weights: {list(weights)} are {len(weights)} weights for the {len(labels)} labels"
            f" {', '.join(labels)}; write one for each"
        )


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
