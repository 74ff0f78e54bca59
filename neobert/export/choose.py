"""Which form an encoder is exported in.

`native` is the architecture that transformers ships as EuroBERT: RMSNorm before each half of a block, rotary positions,
SwiGLU, no biases, attention in both directions. An encoder of ours with these settings is the same function, so its
folder loads with plain `AutoModel` classes. `remote_code` is for everything else: the folder carries the code of
`neobert/model` and needs `trust_remote_code=True`.

Every field of ModelConfig is in one of two tables. A field that is in neither is an error: a new setting must
not be dropped on the way out because nobody thought of it here.
"""

from dataclasses import fields
from typing import Any, Literal

from neobert.errors import UserError
from neobert.model.config import ModelConfig

Form = Literal["native", "remote_code"]


class ExportError(UserError, ValueError):
    """An export that cannot be made or is not exact; the message names every reason."""


CARRIED = frozenset(
    {
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "vocab_size",
        "pad_token_id",
        "rope_theta",
        "dropout_prob",
        "norm_eps",
        "embedding_init_range",
        "decoder_init_range",
        "tie_word_embeddings",
        "global_attention_every",
        "init",
        "init_std",
        "init_zero_residual",
        "base_scale",
    }
)
"""Fields that the native form holds, that do nothing but in training (dropout, initial weights), or that do nothing
where the fields below have their values."""

REQUIRED: dict[str, Any] = {
    "rope": True,
    "rms_norm": True,
    "hidden_act": "swiglu",
    "local_attention": None,
    "qk_norm": False,
    "embedding_norm": False,
    "decoder_bias": False,
    "ngpt": False,
}
"""Fields that the native form has only one value for."""


def choose_form(config: ModelConfig, requested: str) -> Form:
    """`requested`, where `auto` is `native` whenever the architecture allows it.

    Raises:
        ExportError: `native` cannot express the architecture, `requested` is unknown, or ModelConfig has a field that
            this module does not know.
    """
    unknown = [f.name for f in fields(config) if f.name not in CARRIED and f.name not in REQUIRED]
    if unknown:
        raise ExportError(
            f"--format: the export does not know the architecture fields {', '.join(unknown)}; say in CARRIED or "
            "REQUIRED of neobert/export/choose.py whether EuroBERT can express them"
        )
    if requested not in ("auto", "native", "remote_code"):
        raise ExportError(f"--format: {requested!r} is unknown; write auto, native or remote_code")
    problems = [
        f"model.{name}: {getattr(config, name)!r} instead of {value!r}"
        for name, value in REQUIRED.items()
        if getattr(config, name) != value
    ]
    if requested == "native" and problems:
        raise ExportError(
            f"--format: native cannot express this architecture ({'; '.join(problems)}); write auto or remote_code"
        )
    return "remote_code" if problems or requested == "remote_code" else "native"
