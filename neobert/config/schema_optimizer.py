"""The `optimizer` section of a config file."""

from dataclasses import dataclass, field
from typing import Literal

MUON = ("muonclip", "normuon")
"""Optimizers that treat the matrices of the blocks by themselves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSection:
    """Settings of one kind of weights that differ from those of the others."""

    lr: float | None = None
    """Peak learning rate of these weights; null is `optimizer.lr`. The schedule multiplies it."""

    weight_decay: float | None = None
    """Weight decay of these weights; null is what the optimizer has for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupsSection:
    """Kinds of weights with settings of their own: `matrices` are those of the encoder's blocks, `head` every other
    matrix (an untied vocabulary projection), `embeddings` the tables of tokens and positions (a tied vocabulary
    projection too), `vectors` norm weights and the like."""

    matrices: GroupSection = field(default_factory=GroupSection)
    head: GroupSection = field(default_factory=GroupSection)
    embeddings: GroupSection = field(default_factory=GroupSection)
    vectors: GroupSection = field(default_factory=GroupSection)


@dataclass(frozen=True, kw_only=True, slots=True)
class MuonSection:
    """Settings of `optimizer.name: muonclip` and `normuon`."""

    muon_beta: float = 0.95
    """Decay of the running mean of the gradient of a matrix."""

    nesterov: bool = False
    """Orthogonalise `muon_beta` of the way from the gradient to its running mean instead of the mean itself."""

    muon_decay: float = 0.0
    """Weight decay of the matrices; all other weights have `optimizer.weight_decay`, as with adamw."""

    orthogonalization: Literal["polar_express", "newton_schulz"] = "polar_express"
    """Polynomials that bring all singular values of the mean to 1: for each step the best one for what the last one
    leaves, or the same one in all steps."""

    ns_steps: int = 5
    """Polynomials applied one after the other."""

    norm_factor: Literal["spectral", "match_rms_adamw", "none", "legacy_compat"] = "spectral"
    """What an orthogonal matrix of `out` rows and `in` columns is multiplied with, beside the learning rate: spectral
    sqrt(out / in); match_rms_adamw 0.2 sqrt(max(out, in)), with which learning rates of AdamW fit; none 1;
    legacy_compat 0.4 sqrt(max(out, in))."""

    normuon_beta2: float = 0.95
    """normuon: decay of the running mean square of each row of the orthogonal matrices."""

    enable_clipping: bool = True
    """Shrink the queries and keys of attention heads whose largest attention logit exceeds `clipping_threshold`."""

    clipping_threshold: float = 50.0
    """Largest attention logit that is left alone."""

    clipping_alpha: float = 0.5
    """Share of the shrinking that queries take, as an exponent; keys take the rest."""

    clipping_warmup_steps: int = 0
    """Steps at the start without clipping."""

    clipping_interval: int = 10
    """Attention logits are measured and clipped in every n-th step."""

    clipping_qk_chunk_size: int = 1024
    """Queries whose logits are computed at once while measuring; bounds its memory."""

    capture_last_microbatch_only: bool = False
    """true: measure the last micro-batch of a step only, which takes less time and can miss the largest logit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSection:
    """The optimizer. The defaults are those of the NeoBERT paper."""

    name: Literal["adamw", "adam", "stable_adamw", "muonclip", "normuon"] = "adamw"
    """adamw; adam, whose decay is part of the gradient (L2); stable_adamw, AdamW that shortens an update where the
    gradient is larger than its running square says; muonclip, Muon on the matrices of the blocks and AdamW on the rest,
    with clipped attention logits; normuon, the same with rows of equal size. Embeddings, norms and biases do not
    decay."""

    lr: float = 6e-4
    """Peak learning rate."""

    weight_decay: float = 0.1
    """Decay per step is `lr * weight_decay`."""

    decoupled_weight_decay: bool = False
    """true: decay per step is `weight_decay * lr / peak lr`, so that the peak learning rate can change alone;
    1e-5 to 1e-4 are usual then."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""

    eps: float = 1e-8
    """Added to the root of the second moment."""

    groups: GroupsSection = field(default_factory=GroupsSection)
    muon_config: MuonSection = field(default_factory=MuonSection)
