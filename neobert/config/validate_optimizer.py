"""Rules about the `optimizer` section: what has no effect with the optimizer that is named is an error."""

from collections.abc import Iterator

from neobert.config.fields import FIELDS
from neobert.config.schema import Config
from neobert.config.schema_optimizer import MUON

CLIPPING = (
    "clipping_threshold",
    "clipping_alpha",
    "clipping_warmup_steps",
    "clipping_interval",
    "clipping_qk_chunk_size",
    "capture_last_microbatch_only",
)
"""Keys of `optimizer.muon_config` that say how attention logits are clipped."""


def check_optimizer(config: Config) -> Iterator[str]:
    """Keys that contradict `optimizer.name` or each other."""
    section, muon = config.optimizer, "optimizer.muon_config"
    name = section.name
    changed = [key for key in FIELDS if key.startswith(f"{muon}.") and FIELDS[key].value_in(config) != _default(key)]
    if name not in MUON:
        for key in changed:
            yield f"{key}: has no effect with optimizer.name: {name}; remove it, or write one of {', '.join(MUON)}"
    else:
        if name != "normuon" and f"{muon}.normuon_beta2" in changed:
            yield f"{muon}.normuon_beta2: has no effect with optimizer.name: {name}; remove it, or write normuon"
        if not section.muon_config.enable_clipping:
            for key in (f"{muon}.{leaf}" for leaf in CLIPPING):
                if key in changed:
                    yield f"{key}: has no effect with {muon}.enable_clipping: false; remove one of the two"
        if section.groups.matrices.weight_decay is not None:
            yield (
                f"optimizer.groups.matrices.weight_decay: {section.groups.matrices.weight_decay} is written "
                f"{muon}.muon_decay with optimizer.name: {name}"
            )
    if name == "adam" and section.decoupled_weight_decay:
        yield (
            "optimizer.decoupled_weight_decay: true contradicts optimizer.name: adam, whose decay is part of the "
            "gradient; write adamw"
        )
    if config.model.tie_word_embeddings and (section.groups.head.lr, section.groups.head.weight_decay) != (None, None):
        yield (
            "optimizer.groups.head: has no effect with model.tie_word_embeddings: true, the vocabulary projection is "
            "the embedding matrix; write optimizer.groups.embeddings"
        )


def _default(key: str) -> object:
    return FIELDS[key].default
