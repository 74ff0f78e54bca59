"""Parameter groups: which weights decay.

Weight decay pulls matrices of linear layers towards zero. Norm weights and other vectors are left alone, and so are
embeddings: a rare token's row would decay at every step and be updated at few. A tied vocabulary projection is an
embedding, an untied one is a linear layer.
"""

from typing import Any

from torch import nn


def build_parameter_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, decayed and not, in the order of `named_parameters`; every trainable parameter is in exactly one.

    Each group holds `params`, `names` and `weight_decay`. A shared parameter appears once. Empty groups are left out.
    """
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = [(name, p) for name, p in trainable if p.ndim >= 2 and id(p) not in embeddings]
    others = [(name, p) for name, p in trainable if p.ndim < 2 or id(p) in embeddings]
    return [
        {"params": [p for _, p in members], "names": [name for name, _ in members], "weight_decay": decay}
        for members, decay in ((decayed, weight_decay), (others, 0.0))
        if members
    ]
