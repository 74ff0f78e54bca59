"""Keys of `finetune`: an encoder learns what is labelled."""

from dataclasses import dataclass
from typing import Literal

from neobert.key import key


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSection:
    """Fine-tuning on labelled texts (`task: finetune`): classes, several labels a text, numbers, or labels of words. A
    row is a text, or a pair of texts."""

    # Read by a fresh start only: free.
    model: str | None = key(None, path=True, resume="free")
    """The encoder to start from: a run folder, one of its checkpoints, an exported folder or a name of the hub. Its
    architecture and tokenizer are used; a key of `model` that says otherwise is an error."""

    allow_random_weights: bool = key(False, resume="free")
    """true: start without an encoder, from random weights of `model` and the tokenizer of `tokenizer`."""

    kind: Literal["auto", "classification", "multilabel", "regression", "tokens"] = key("auto", resume="fixed")
    """What a label is. classification: one of several classes. multilabel: a list of labels, any number of them.
    regression: a number. tokens: a label for each word of a list (`tokens`, with tags `B-X`, `I-X` and `O`). auto looks
    at the label column; the run writes what it found into its config."""

    # Other columns of the same rows are other data.
    text_column: str | None = key(None, resume="order")
    """Column of the text, or of the list of words. null takes the first of the usual names that is there (text,
    sentence, sentence1, ...; tokens, words)."""

    pair_column: str | None = key(None, resume="order")
    """Column of the second text of a pair. null takes the usual partner of the first (sentence2 of sentence1, ...)
    where there is one."""

    label_column: str | None = key(None, resume="order")
    """Column of the label. null takes `label`, `labels`, `score`, `ner_tags`, `tags`, ... ."""

    labels: tuple[str, ...] = key((), resume="fixed")
    """Names of the labels in the order of their numbers. Empty: those of the data, sorted; labels that are integers
    keep their numbers, and these are their names. The run writes them into its config, its checkpoints hold them."""

    pooling: Literal["mean", "cls"] = key("mean", resume="fixed")
    """What of a text goes into the head: the mean of its tokens, or [CLS]."""

    classifier_dropout: float = key(0.1, at_least=0, below=1, resume="declared")
    """Dropout before the last layer of the head. `model.dropout_prob` is that of the encoder."""

    class_weights: str | tuple[str, ...] | None = key(
        None, needs="finetune.kind=auto|classification|tokens", resume="declared"
    )
    """Weight of each label in the loss: balanced (rows / (labels x rows of the label)), or a list of numbers in the
    order of the labels. null (or none): all alike."""

    # Read by a fresh start only: free.
    initial_score: float | None = key(None, needs="finetune.kind=auto|regression", resume="free")
    """What a model of numbers answers before it has learned: the bias of its last layer at the start. null: the mean of
    the labels of the training rows, which the run writes into its config."""

    # It groups the weights of the optimizer.
    layer_lr_decay: float | None = key(None, above=0, at_most=1, resume="fixed")
    """The learning rate of each block is this many times that of the block after it; the head has the full one, the
    embeddings the lowest. null: one rate for all."""

    num_frozen_layers: int = key(0, at_least=0, resume="fixed")
    """The embeddings and this many first blocks stay as they are; 0 trains everything."""

    # Metrics before and after could not be compared.
    metric: str | None = key(None, resume="declared", changes="evaluation")
    """What `trainer.save_best` and `early_stopping` compare: loss, or a metric of the evaluation. null: accuracy for
    classification, micro_f1 for multilabel, spearman for regression, entity_f1 for tokens."""

    early_stopping: int | None = key(None, at_least=1, resume="declared")
    """End the run after so many evaluations without a better `metric`; null trains until the budget is spent."""

    seeds: tuple[int, ...] = key((), at_least=0, resume="free")
    """Train once with each of these seeds, in `<trainer.output_dir>/seed-N`, and write mean and standard deviation to
    `seeds.json`. Empty: one run, with `seed`."""
