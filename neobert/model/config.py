"""ModelConfig: the architecture of an encoder, and nothing about a run.

It is built once from the user's `model` section, with the bound vocabulary size and padding id, and saved beside the
weights as `model_config.json`: whoever holds that file and the weights can rebuild the model.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

HIDDEN_ACTS = ("swiglu", "gelu")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The architecture of an encoder. Raises ValueError, naming the key, for values that make no model."""

    hidden_size: int
    """Width of the residual stream."""

    num_hidden_layers: int
    """Number of encoder blocks."""

    num_attention_heads: int
    """Number of attention heads; divides `hidden_size`."""

    intermediate_size: int
    """Width of the feed-forward layer before the 2/3 rule of SwiGLU (see `ffn_size`)."""

    max_position_embeddings: int
    """Longest document, in tokens."""

    vocab_size: int
    """Rows of the embedding; at least the tokenizer's size."""

    pad_token_id: int
    """Token id of padding. No computation reads it: padding is a segment of its own."""

    rope: bool = True
    """True: rotary positions. False: learned position embeddings, counted per document."""

    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""

    rms_norm: bool = True
    """True: RMSNorm. False: LayerNorm without bias."""

    hidden_act: str = "swiglu"
    """Feed-forward layer: `swiglu` or `gelu` (exact)."""

    dropout_prob: float = 0.0
    """Dropout on the outputs of attention and feed-forward layer; never on attention probabilities."""

    norm_eps: float = 1e-5
    """Added to the mean square (or variance) inside the norms."""

    embedding_init_range: float = 0.02
    """Embeddings start uniform in (-range, +range)."""

    decoder_init_range: float = 0.02
    """Linear layers start uniform in (-range, +range)."""

    tie_word_embeddings: bool = True
    """Whether the vocabulary projection is the embedding matrix itself."""

    local_attention: int | None = None
    """Sliding window: a token attends to those of its document at most `local_attention // 2` positions away. None: no
    layer has one."""

    global_attention_every: int = 3
    """With `local_attention`, layers 0, k, 2k, ... have no window."""

    qk_norm: bool = False
    """RMSNorm of every head's queries and keys, with a gain for each coordinate of a head, before the rotation."""

    embedding_norm: bool = False
    """A norm between the embedding and the first block."""

    decoder_bias: bool = False
    """A bias on the vocabulary projection, 0 at the start."""

    init: str = "uniform"
    """Initial weights: `uniform`, `truncated_normal`, `megatron` or `small`; see `init.py`."""

    init_std: float | None = None
    """Standard deviation of `truncated_normal` and `megatron`; None: 0.02."""

    init_zero_residual: bool = False
    """Whether the outputs of attention and feed-forward layer start at 0."""

    ngpt: bool = False
    """The normalised model; see `ngpt.py`."""

    base_scale: float | None = None
    """With `ngpt`, what the stored scales start at; None: 1 / sqrt(hidden_size)."""

    def __post_init__(self) -> None:
        problems = [
            f"model.{name}: {value} is not positive; write a positive number"
            for name in _POSITIVE
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        if not problems and self.hidden_size % self.num_attention_heads:
            problems.append(
                f"model.num_attention_heads: {self.num_attention_heads} does not divide model.hidden_size "
                f"{self.hidden_size}; choose a divisor"
            )
        elif not problems and self.rope and self.head_dim % 2:
            problems.append(
                f"model.rope: rotary positions need an even head size, and model.hidden_size {self.hidden_size} / "
                f"model.num_attention_heads {self.num_attention_heads} is {self.head_dim}; choose another number of "
                "heads or model.rope: false"
            )
        if self.hidden_act not in HIDDEN_ACTS:
            problems.append(f"model.hidden_act: {self.hidden_act!r} is unknown; write one of {', '.join(HIDDEN_ACTS)}")
        if not 0 <= self.dropout_prob < 1:
            problems.append(f"model.dropout_prob: {self.dropout_prob} is outside [0, 1); write 0 for no dropout")
        if not 0 <= self.pad_token_id < max(self.vocab_size, 1):
            problems.append(
                f"model.pad_token_id: {self.pad_token_id} is not a row of a vocabulary of {self.vocab_size}; take "
                "both from the same tokenizer"
            )
        problems += variant_problems(self)
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Width inside the feed-forward layer.

        SwiGLU has three matrices where GELU has two; 2/3 of `intermediate_size`, rounded up to a multiple of 8, keeps
        the number of parameters (Shazeer, arXiv 2002.05202, section 3).
        """
        if self.hidden_act == "gelu":
            return self.intermediate_size
        return -(-int(2 * self.intermediate_size / 3) // 8) * 8

    @property
    def scale_base(self) -> float:
        """`base_scale`, or its default."""
        return self.hidden_size**-0.5 if self.base_scale is None else self.base_scale

    def window_of_layer(self, layer: int) -> int | None:
        """The sliding window of a layer, counted from 0; None where it attends to whole documents."""
        return None if layer % self.global_attention_every == 0 else self.local_attention

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises ValueError naming every unknown and every missing key.

        A file that was written before a key was added means its default.
        """
        names = [f.name for f in fields(cls)]
        unknown = [k for k in values if k not in names]
        missing = [k for k in names if k not in values and k not in _ADDED]
        problems = []
        if unknown:
            problems.append(f"unknown keys {', '.join(unknown)}: remove them, or use the version that wrote them")
        if missing:
            problems.append(f"missing keys {', '.join(missing)}: add them")
        if problems:
            raise ValueError("model config: " + "; ".join(problems))
        return cls(**values)


_POSITIVE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "vocab_size",
    "rope_theta",
    "norm_eps",
    "embedding_init_range",
    "decoder_init_range",
    "local_attention",
    "global_attention_every",
    "init_std",
    "base_scale",
)

_ADDED = (
    "local_attention",
    "global_attention_every",
    "qk_norm",
    "embedding_norm",
    "decoder_bias",
    "init",
    "init_std",
    "init_zero_residual",
    "ngpt",
    "base_scale",
)
"""Keys that the first version of `model_config.json` did not have; their defaults are what it did."""

_OF_A_RUN = (
    "vocab_size",
    "pad_token_id",
    "dropout_prob",
    "embedding_init_range",
    "decoder_init_range",
    "init",
    "init_std",
    "init_zero_residual",
)

ARCHITECTURE = tuple(f.name for f in fields(ModelConfig) if f.name not in _OF_A_RUN)
"""Fields that decide what weights mean. The others follow the tokenizer, or act on nothing but training."""

INITS_WITH_STD = ("truncated_normal", "megatron")

_NOT_IN_NGPT: dict[str, Any] = {
    "rope": True,
    "rms_norm": True,
    "hidden_act": "swiglu",
    "dropout_prob": 0.0,
    "norm_eps": 1e-5,
    "embedding_init_range": 0.02,
    "decoder_init_range": 0.02,
    "init": "uniform",
    "init_std": None,
    "init_zero_residual": False,
    "qk_norm": False,
    "embedding_norm": False,
    "decoder_bias": False,
}
"""Settings that the normalised model has its own answer to, and their defaults."""

_UNIFORM_RANGES = {"embedding_init_range": 0.02, "decoder_init_range": 0.02}


def variant_problems(model: Any) -> Iterator[str]:
    """Settings that contradict each other or do nothing together, of a ModelConfig or the section of the same names."""
    if model.ngpt:
        for name, default in _NOT_IN_NGPT.items():
            if (value := getattr(model, name)) != default:
                yield (
                    f"model.{name}: {value} is not part of the normalised model (model.ngpt: true); remove it, its "
                    f"default is {default}"
                )
        return
    if model.base_scale is not None:
        yield f"model.base_scale: {model.base_scale} has no effect without model.ngpt: true; remove one of the two"
    if model.init != "uniform":
        for name, default in _UNIFORM_RANGES.items():
            if (value := getattr(model, name)) != default:
                yield f"model.{name}: {value} has no effect with model.init: {model.init}; remove one of the two"
    if model.init_std is not None and model.init not in INITS_WITH_STD:
        yield (
            f"model.init_std: {model.init_std} has no effect with model.init: {model.init}; remove it, or write "
            f"model.init: {' or '.join(INITS_WITH_STD)}"
        )
