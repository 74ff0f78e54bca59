"""The `optimizer` section of a config file."""

from dataclasses import dataclass
from typing import Literal

from neobert.key import key, section

MUON = ("muonclip", "normuon")
"""Optimizers that treat the matrices of the blocks by themselves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSection:
    """Settings of one kind of weights that differ from those of the others."""

    # Free to change with the schedule, which multiplies it.
    lr: float | None = key(None, above=0, resume="schedule")
    """Peak learning rate of these weights; null is `optimizer.lr`. The schedule multiplies it."""

    weight_decay: float | None = key(None, at_least=0, resume="declared")
    """Weight decay of these weights; null is what the optimizer has for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupsSection:
    """Kinds of weights with settings of their own: `matrices` are those of the encoder's blocks, `head` every other
    matrix (an untied vocabulary projection), `embeddings` the tables of tokens and positions (a tied vocabulary
    projection too), `vectors` norm weights and the like."""

    matrices: GroupSection = section(GroupSection)
    head: GroupSection = section(GroupSection, needs="model.tie_word_embeddings=false")
    embeddings: GroupSection = section(GroupSection)
    vectors: GroupSection = section(GroupSection)


@dataclass(frozen=True, kw_only=True, slots=True)
class MuonSection:
    """Settings of `optimizer.name: muonclip` and `normuon`."""

    muon_beta: float = key(0.95, at_least=0, below=1, resume="declared")
    """Decay of the running mean of the gradient of a matrix."""

    muon_beta_start: float | None = key(None, at_least=0, below=1, resume="declared")
    """`muon_beta` at the start: it rises linearly in `muon_beta_warmup_steps`, and falls back to this in the
    `muon_beta_cooldown_steps` before the decay of the learning rate ends. null: constant. 0.85 is usual."""

    muon_beta_warmup_steps: int = key(300, at_least=0, needs="optimizer.muon_config.muon_beta_start", resume="declared")
    """Steps in which `muon_beta` is reached; 0: from the first on."""

    muon_beta_cooldown_steps: int = key(0, at_least=0, needs="optimizer.muon_config.muon_beta_start", resume="declared")
    """Steps in which it falls back to `muon_beta_start`; 0: it does not."""

    split_heads: bool = key(False, resume="declared")
    """Orthogonalise the queries of each head by themselves, and the keys, instead of those of all heads together. With
    `norm_factor` spectral their updates are smaller then: sqrt(head size / hidden size)."""

    nesterov: bool = key(False, resume="declared")
    """Orthogonalise `muon_beta` of the way from the gradient to its running mean instead of the mean itself."""

    muon_decay: float = key(0.0, at_least=0, resume="declared")
    """Weight decay of the matrices; all other weights have `optimizer.weight_decay`, as with adamw."""

    orthogonalization: Literal["polar_express", "newton_schulz"] = key("polar_express", resume="declared")
    """Polynomials that bring all singular values of the mean to 1: for each step the best one for what the last one
    leaves, or the same one in all steps."""

    ns_steps: int = key(5, at_least=1, resume="declared")
    """Polynomials applied one after the other."""

    norm_factor: Literal["spectral", "match_rms_adamw", "none", "legacy_compat"] = key("spectral", resume="declared")
    """What an orthogonal matrix of `out` rows and `in` columns is multiplied with, beside the learning rate: spectral
    sqrt(out / in); match_rms_adamw 0.2 sqrt(max(out, in)), with which learning rates of AdamW fit; none 1;
    legacy_compat 0.4 sqrt(max(out, in))."""

    normuon_beta2: float = key(0.95, at_least=0, below=1, needs="optimizer.name=normuon", resume="declared")
    """normuon: decay of the running mean square of each row of the orthogonal matrices."""

    enable_clipping: bool = key(True, resume="declared")
    """Shrink the queries and keys of attention heads whose largest attention logit exceeds `clipping_threshold`."""

    clipping_threshold: float = key(50.0, above=0, needs="optimizer.muon_config.enable_clipping", resume="declared")
    """Largest attention logit that is left alone."""

    clipping_alpha: float = key(
        0.5, at_least=0, at_most=1, needs="optimizer.muon_config.enable_clipping", resume="declared"
    )
    """Fraction of the shrinking that queries take, as an exponent; keys take the rest."""

    clipping_warmup_steps: int = key(0, at_least=0, needs="optimizer.muon_config.enable_clipping", resume="declared")
    """Steps at the start without clipping."""

    clipping_interval: int = key(10, at_least=1, needs="optimizer.muon_config.enable_clipping", resume="declared")
    """Attention logits are measured and clipped in every n-th step."""

    # The same maxima, fewer at once.
    clipping_qk_chunk_size: int = key(1024, at_least=1, needs="optimizer.muon_config.enable_clipping", resume="free")
    """Queries whose logits are computed at once while measuring; bounds its memory."""

    capture_last_microbatch_only: bool = key(
        False, needs="optimizer.muon_config.enable_clipping", tasks="pretraining", resume="declared"
    )
    """true: measure the last micro-batch of a step only, which takes less time and can miss the largest logit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSection:
    """The optimizer. The defaults are those of the NeoBERT paper."""

    name: Literal["adamw", "adam", "stable_adamw", "muonclip", "normuon"] = key("adamw", resume="fixed")
    """adamw; adam, whose decay is part of the gradient (L2); stable_adamw, AdamW that shortens an update where the
    gradient is larger than its running square says; muonclip, Muon on the matrices of the blocks and AdamW on the rest,
    with clipped attention logits; normuon, the same with rows of equal size. Embeddings, norms and biases do not
    decay."""

    # Free to change with the schedule, which multiplies it.
    lr: float = key(6e-4, above=0, resume="schedule")
    """Peak learning rate."""

    weight_decay: float = key(0.1, at_least=0, resume="declared")
    """Decay per step is `lr * weight_decay`."""

    decoupled_weight_decay: bool = key(False, resume="declared")
    """true: decay per step is `weight_decay * lr / peak lr`, so that the peak learning rate can change alone;
    1e-5 to 1e-4 are usual then."""

    cautious_weight_decay: bool = key(False, needs="optimizer.name=adamw|muonclip|normuon", resume="declared")
    """Decay a weight only where its update does not move it away from zero (arXiv 2510.12402)."""

    betas: tuple[float, float] = key((0.9, 0.95), at_least=0, below=1, resume="declared")
    """Decay of the running means of the gradient and of its square."""

    eps: float = key(1e-8, above=0, resume="declared")
    """Added to the root of the second moment."""

    groups: GroupsSection = section(GroupsSection)
    muon_config: MuonSection = section(MuonSection, needs="optimizer.name=muonclip|normuon")
