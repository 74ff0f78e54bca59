"""Models with a head on labels, as transformers' classes for sequence and token classification hold them.

Such a folder has the encoder, the head and the names of its labels. The vocabulary projection, which fine-tuning leaves
as it was, stays behind: those classes have none, and would report its tensors as unexpected.
"""

from dataclasses import replace
from typing import Any, Literal

from neobert.export.forms import Form
from neobert.objectives.classification import HeadInfo
from neobert.weights.encoder_weights import EncoderWeights

AutoClass = Literal["MaskedLM", "SequenceClassification", "TokenClassification"]
"""What comes after `AutoModelFor`."""

_PROBLEMS = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}
_PROJECTION = ("decoder.weight", "decoder_bias", "prediction_head.")
"""Names of its weights, or their starts."""

_POOLING = {"native": {"mean": "mean", "cls": "bos"}, "remote_code": {"mean": "mean", "cls": "cls"}}


def find_head(weights: EncoderWeights) -> HeadInfo | None:
    """The head that the weights come with, if it is one on labels."""
    return None if weights.head is None or not weights.training_only else HeadInfo.from_dict(weights.head)


def choose_class(head: HeadInfo | None) -> AutoClass:
    """The class of transformers whose `logits` are what the model says."""
    if head is None:
        return "MaskedLM"
    return "TokenClassification" if head.kind == "tokens" else "SequenceClassification"


def drop_projection(weights: EncoderWeights) -> tuple[EncoderWeights, str | None]:
    """The weights of a model with a head on labels without their vocabulary projection, and a sentence about it."""
    config = weights.config
    without = replace(config, tie_word_embeddings=True, decoder_bias=False, prediction_head=False)
    if find_head(weights) is None or without == config:
        return weights, None
    tensors = {name: x for name, x in weights.tensors.items() if not name.startswith(_PROJECTION)}
    note = "the vocabulary projection, which a model of labels has no use for, is left out"
    return replace(weights, config=without, tensors=tensors), note


def describe_labels(head: HeadInfo, form: Form) -> dict[str, Any]:
    """What config.json says of a head."""
    prefix = "EuroBert" if form == "native" else "NeobertEncoder"
    labels = head.labels or ("LABEL_0",)
    described: dict[str, Any] = {
        "architectures": [f"{prefix}For{choose_class(head)}"],
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    if head.kind != "tokens":
        described["problem_type"] = _PROBLEMS[head.kind]
        described["classifier_pooling"] = _POOLING[form][head.pooling]
    return described
