"""Formats of weights: one file a family, each with how its tensors and its config become ours and back.

`conversion.py` says what a layout is. A family is added by its file and a line of LAYOUTS.
"""

from neobert.weights.layouts.conversion import Layout, Rule, from_ours, tensor_shapes, to_ours
from neobert.weights.layouts.eurobert import EUROBERT
from neobert.weights.layouts.llama import LLAMA, QWEN3
from neobert.weights.layouts.modernbert import MODERNBERT
from neobert.weights.layouts.own import CHECKPOINT, REMOTE_CODE, REMOTE_CODE_TYPE
from neobert.weights.layouts.published_neobert import NEOBERT, NEOBERT_FORK, choose_neobert

__all__ = [
    "LAYOUTS",
    "OTHER_ARCHITECTURES",
    "TYPES",
    "Layout",
    "Rule",
    "choose_neobert",
    "from_ours",
    "tensor_shapes",
    "to_ours",
]

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (CHECKPOINT, REMOTE_CODE, EUROBERT, MODERNBERT, LLAMA, QWEN3, NEOBERT, NEOBERT_FORK)
}
"""All formats. `neobert` is that of the published model, `neobert_fork` that of training code derived from it."""

TYPES: dict[str, str] = {
    **{layout.name: layout.name for layout in (EUROBERT, MODERNBERT, LLAMA, QWEN3, NEOBERT)},
    REMOTE_CODE_TYPE: REMOTE_CODE.name,
}
"""`model_type` of a config.json -> its layout."""

_POST_NORM = (
    "its blocks normalise their sum, with biases everywhere and learned positions, where ours normalise what they "
    "read: another architecture, and no pretraining continues it here; task: finetune takes it as it is"
)
OTHER_ARCHITECTURES: dict[str, str] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "mpnet"), _POST_NORM),
    "qwen2": "its queries, keys and values have biases, which our blocks have not; Qwen 3 has none and is read",
}
"""`model_type` -> why it cannot be read as an encoder of ours."""
