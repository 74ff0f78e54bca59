"""The architecture of an encoder, and nothing about a run.

Its keys are those of section `model` of a config file, which adds where weights come from and what runs them. A
`ModelConfig` is built from it once, with the vocabulary size and padding id of the tokenizer, and saved beside the
weights as `model_config.json`: whoever holds that file and the weights can rebuild the model.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from neobert.key import key, when


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What an encoder computes: the keys that section `model` of a config and the `ModelConfig` of a run share."""

    hidden_size: int = key(768, at_least=1, resume="fixed")
    """Width of the residual stream; a multiple of `num_attention_heads`."""

    num_hidden_layers: int = key(12, at_least=1, resume="fixed")
    """Number of encoder blocks."""

    num_attention_heads: int = key(12, at_least=1, resume="fixed")
    """Attention heads of each block; with `rope` the head width `hidden_size / num_attention_heads` must be even."""

    intermediate_size: int = key(3072, at_least=1, resume="fixed")
    """Width of the feed-forward layer. SwiGLU and GeGLU use 2/3 of it, rounded up to a multiple of 8, so that all
    activations have about the same number of parameters."""

    # Learned positions are weights, of that number of rows.
    max_position_embeddings: int = key(1024, at_least=1, resume=when("model.rope", "declared", otherwise="fixed"))
    """Longest document the model can read, in tokens; at least `dataset.max_seq_length`."""

    rope: bool = key(True, resume="fixed")
    """true: rotary position embeddings; false: learned ones, counted from 0 in every document."""

    rope_theta: float = key(10000.0, above=0, resume="declared")
    """Base of the rotary frequencies; larger values suit longer documents."""

    local_rope_theta: float | None = key(None, above=0, needs="model.local_attention", resume="declared")
    """With `local_attention`: the base in layers with a window. null: `rope_theta`."""

    rms_norm: bool = key(True, resume="fixed")
    """true: RMSNorm; false: LayerNorm."""

    hidden_act: Literal["swiglu", "gelu", "geglu"] = key("swiglu", resume="fixed")
    """Feed-forward activation; SwiGLU and GeGLU are gated."""

    dropout_prob: float = key(0.0, at_least=0, below=1, resume="declared")
    """Dropout on the outputs of attention and feed-forward layers, never on attention probabilities."""

    norm_eps: float = key(1e-5, above=0, resume="fixed")
    """Added to the variance in every norm."""

    embedding_init_range: float = key(0.02, above=0, resume="free")
    """Embeddings start uniform in (-range, range)."""

    decoder_init_range: float = key(0.02, above=0, resume="free")
    """Linear layers start uniform in (-range, range)."""

    tie_word_embeddings: bool = key(True, resume="fixed")
    """Predict tokens with the embedding matrix itself instead of a second matrix."""

    local_attention: int | None = key(None, at_least=1, resume="fixed")
    """Sliding window in tokens: a token attends to those of its document at most `local_attention // 2` tokens away, to
    either side. null: every layer attends to whole documents."""

    global_attention_every: int = key(
        3, at_least=2, because="1 leaves no layer a window", needs="model.local_attention", resume="fixed"
    )
    """With `local_attention`: layers 0, k, 2k, ... attend to whole documents all the same."""

    qk_norm: bool = key(False, resume="fixed")
    """RMSNorm of the queries and keys of every head, with a learned gain, before the rotary positions: attention logits
    cannot grow without bound."""

    embedding_norm: bool = key(False, resume="fixed")
    """A norm between the embedding and the first block."""

    first_attention_norm: bool = key(True, resume="fixed")
    """false: the attention of the first block has no norm of its own, as in ModernBERT; with `embedding_norm`."""

    prediction_head: bool = key(False, resume="fixed")
    """A linear layer, GELU and a norm between the last hidden state and the vocabulary projection, as in BERT and
    ModernBERT."""

    decoder_bias: bool = key(False, resume="fixed")
    """A bias for each token on the vocabulary projection. Published NeoBERT has one."""

    init: Literal["uniform", "truncated_normal", "megatron", "small"] = key("uniform", resume="free")
    """Initial weights. `uniform`: within `embedding_init_range` and `decoder_init_range`. `truncated_normal`: normal
    with `init_std`, cut at twice that. `megatron`: normal with `init_std`, divided by sqrt(2 `num_hidden_layers`) in
    the layers that write into the residual stream. `small`: normal with sqrt(2 / (5 `hidden_size`)), and
    2 / (`num_hidden_layers` sqrt(`hidden_size`)) in those layers."""

    init_std: float | None = key(None, above=0, resume="free")
    """Standard deviation of `truncated_normal` and `megatron`; null is 0.02."""

    init_zero_residual: bool = key(False, resume="free")
    """The layers that write into the residual stream start at 0, and so every block as the identity."""

    ngpt: bool = key(False, resume="fixed")
    """The normalised model (nGPT): hidden states and the vectors of all matrices have length 1, learned scales replace
    norms. Needs `optimizer.weight_decay: 0`; a warm-up is not needed."""

    base_scale: float | None = key(None, above=0, resume="fixed")
    """With `ngpt`: where the stored scales start; the smaller, the faster they learn. null: 1 / sqrt(`hidden_size`)."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Width inside the feed-forward layer.

        Gated activations have three matrices where GELU has two; 2/3 of `intermediate_size`, rounded up to a multiple
        of 8, keeps the number of parameters (Shazeer, arXiv 2002.05202, section 3).
        """
        if not self.is_gated:
            return self.intermediate_size
        return -(-int(2 * self.intermediate_size / 3) // 8) * 8

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layer multiplies two projections."""
        return self.hidden_act != "gelu"

    @property
    def scale_base(self) -> float:
        """`base_scale`, or its default."""
        return self.hidden_size**-0.5 if self.base_scale is None else self.base_scale

    def window_of_layer(self, layer: int) -> int | None:
        """The sliding window of a layer, counted from 0; None where it attends to whole documents."""
        return None if layer % self.global_attention_every == 0 else self.local_attention

    def theta_of_layer(self, layer: int) -> float:
        """The base of the rotary frequencies of a layer, counted from 0."""
        if self.local_rope_theta is None or self.window_of_layer(layer) is None:
            return self.rope_theta
        return self.local_rope_theta


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Architecture):
    """The architecture of an encoder. Raises ValueError, naming the key, for values that make no model."""

    vocab_size: int
    """Rows of the embedding; at least the tokenizer's size."""

    pad_token_id: int
    """Token id of padding. No computation reads it: padding is a segment of its own."""

    hub_config: dict[str, Any] | None = None
    """The config.json of an encoder of transformers, which is then used instead of ours (`neobert.model.hub_encoder`);
    the other fields repeat what they can of it."""

    def __post_init__(self) -> None:
        problems = list(architecture_problems(self))
        for field in fields(Architecture):
            problems += field.metadata["key"].range_problems(f"model.{field.name}", getattr(self, field.name))
        for name, kind in get_type_hints(Architecture).items():
            if get_origin(kind) is Literal and (value := getattr(self, name)) not in get_args(kind):
                problems.append(f"model.{name}: {value!r} is unknown; write one of {', '.join(get_args(kind))}")
        if not 0 <= self.pad_token_id < self.vocab_size:
            problems.append(
                f"model.pad_token_id: {self.pad_token_id} is not a row of a vocabulary of {self.vocab_size}; take "
                "both from the same tokenizer"
            )
        if problems:
            raise ValueError("\n".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready; without `hub_config` where there is none."""
        return {name: value for name, value in asdict(self).items() if name != "hub_config" or value is not None}

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


FP8_MULTIPLE = 16
"""Of every dimension of an operand of a product in fp8, on CUDA."""

_ADDED = (
    "local_attention",
    "global_attention_every",
    "local_rope_theta",
    "qk_norm",
    "embedding_norm",
    "first_attention_norm",
    "prediction_head",
    "decoder_bias",
    "init",
    "init_std",
    "init_zero_residual",
    "ngpt",
    "base_scale",
    "hub_config",
)
"""Keys that the first version of `model_config.json` did not have; their defaults are what it did."""

_OF_A_RUN = (
    "dropout_prob",
    "embedding_init_range",
    "decoder_init_range",
    "init",
    "init_std",
    "init_zero_residual",
)

ARCHITECTURE = tuple(f.name for f in fields(Architecture) if f.name not in _OF_A_RUN)
"""Fields that decide what weights mean. The others act on nothing but training."""

INITS_WITH_STD = ("truncated_normal", "megatron")

_DEFAULTS = Architecture()

_NOT_IN_NGPT = (
    "rope",
    "rms_norm",
    "hidden_act",
    "dropout_prob",
    "norm_eps",
    "embedding_init_range",
    "decoder_init_range",
    "init",
    "init_std",
    "init_zero_residual",
    "qk_norm",
    "embedding_norm",
    "first_attention_norm",
    "prediction_head",
    "decoder_bias",
)
"""Settings that the normalised model has its own answer to."""


def architecture_problems(model: Architecture) -> Iterator[str]:
    """Settings that contradict each other or do nothing together."""
    size, heads = model.hidden_size, model.num_attention_heads
    if size >= 1 and heads >= 1:
        if size % heads:
            yield f"model.num_attention_heads: {heads} does not divide model.hidden_size {size}; choose a divisor"
        elif model.rope and model.head_dim % 2:
            yield (
                f"model.rope: rotary positions need an even head size, and model.hidden_size {size} / "
                f"model.num_attention_heads {heads} is {model.head_dim}; choose another number of heads or "
                "model.rope: false"
            )
    if model.local_rope_theta is not None:
        if not model.rope:
            yield f"model.local_rope_theta: {model.local_rope_theta} has no effect with model.rope: false; remove it"
        elif model.local_rope_theta == model.rope_theta:
            yield f"model.local_rope_theta: {model.local_rope_theta} is model.rope_theta itself; remove it"
    if model.ngpt:
        for name in _NOT_IN_NGPT:
            if (value := getattr(model, name)) != (default := getattr(_DEFAULTS, name)):
                yield (
                    f"model.{name}: {value} is not part of the normalised model (model.ngpt: true); remove it, its "
                    f"default is {default}"
                )
        return
    if not (model.first_attention_norm or model.embedding_norm):
        yield (
            "model.first_attention_norm: false leaves the first block without any norm before it; write "
            "model.embedding_norm: true too, or remove it"
        )
    if model.base_scale is not None:
        yield f"model.base_scale: {model.base_scale} has no effect without model.ngpt: true; remove one of the two"
    if model.init != "uniform":
        for name in ("embedding_init_range", "decoder_init_range"):
            if (value := getattr(model, name)) != getattr(_DEFAULTS, name):
                yield f"model.{name}: {value} has no effect with model.init: {model.init}; remove one of the two"
    if model.init_std is not None and model.init not in INITS_WITH_STD:
        yield (
            f"model.init_std: {model.init_std} has no effect with model.init: {model.init}; remove it, or write "
            f"model.init: {' or '.join(INITS_WITH_STD)}"
        )


def fp8_problems(model: Architecture) -> Iterator[str]:
    """Sizes that products in fp8 cannot have."""
    for name, size in (("hidden_size", model.hidden_size), ("intermediate_size", model.ffn_size)):
        if size % FP8_MULTIPLE:
            value = getattr(model, name)
            made = "" if size == value else f", a feed-forward width of {size},"
            yield (
                f"model.{name}: {value}{made} is no multiple of {FP8_MULTIPLE}, as trainer.fp8 needs it; choose "
                "another, or write trainer.fp8: no"
            )
