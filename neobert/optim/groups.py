"""Parameter groups: which weights decay, and which have a learning rate of their own.

Every weight has one role:

| role | weights | decay |
|---|---|---|
| matrices | of the encoder's blocks | yes |
| head | every other matrix, an untied vocabulary projection for one | yes |
| embeddings | tables of tokens and positions; a tied vocabulary projection too | no |
| vectors | norm weights and whatever has less than two dimensions | no |

Weight decay pulls matrices towards zero. Vectors are left alone, and so are embeddings: a rare token's row would decay
at every step and be updated at few.

A group holds `params`, their `names`, its `roles`, and `weight_decay`. Its learning rate is `lr_factor` times the one
of the schedule, so that the rate of every group is a function of the step. Where nothing else is asked for there are
two groups, decayed and not. A resumed run may group its weights in another way: `regroup_state` goes by their names.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from neobert.config.schema_optimizer import MUON, GroupSection, OptimizerSection

ROLES = ("matrices", "head", "embeddings", "vectors")
DECAYED = ("matrices", "head")
"""Roles with weight decay."""


_BLOCK = re.compile(r"(?:^|\.)layers?\.(\d+)\.")
"""In names of weights: which block, ours and those of transformers."""


def choose_role(name: str, parameter: Tensor, *, is_embedding: bool) -> str:
    """The role of a parameter with this dotted name."""
    if is_embedding:
        return "embeddings"
    if parameter.ndim < 2:
        return "vectors"
    return "matrices" if _BLOCK.search(name) else "head"


def choose_own_settings(section: OptimizerSection) -> dict[str, GroupSection]:
    """Settings by role, of the roles that have their own. With Muon the matrices always have: their decay is Muon's."""
    own = {role: getattr(section.groups, role) for role in ROLES}
    if section.name in MUON:
        own["matrices"] = replace(own["matrices"], weight_decay=section.muon_config.muon_decay)
    return {role: settings for role, settings in own.items() if settings != GroupSection()}


def build_parameter_groups(module: nn.Module, section: OptimizerSection) -> list[dict[str, Any]]:
    """Groups of all trainable parameters, each parameter in exactly one, in the order of `named_parameters`.

    A shared parameter appears once. A role with its own settings has its own group. Empty groups are left out.
    """
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    own = choose_own_settings(section)
    members: dict[tuple[str, ...], list[tuple[str, nn.Parameter]]] = {}
    for roles in _partition(set(own)):
        members[roles] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            role = choose_role(name, parameter, is_embedding=id(parameter) in embeddings)
            next(found for roles, found in members.items() if role in roles).append((name, parameter))
    groups = []
    for roles, found in members.items():
        settings = own.get(roles[0], GroupSection())
        peak = section.lr if settings.lr is None else settings.lr
        decay = settings.weight_decay
        if decay is None:
            decay = section.weight_decay if roles[0] in DECAYED else 0.0
        if found:
            groups.append(
                {
                    "params": [parameter for _, parameter in found],
                    "names": [name for name, _ in found],
                    "roles": list(roles),
                    "weight_decay": decay / peak if section.decoupled_weight_decay else decay,
                    "lr": peak,
                    "lr_factor": peak / section.lr,
                }
            )
    return groups


def split_by_depth(
    groups: Sequence[dict[str, Any]], decay: float | None, num_layers: int, *, decoupled: bool = False
) -> list[dict[str, Any]]:
    """`groups` with the learning rate of every block `decay` times that of the block after it (Howard & Ruder, arXiv
    1801.06146, section 3.2): 1 for what comes after the last block, the lowest for the embeddings. None: as they are.

    Args:
        decoupled: whether the weight decay of the groups is one of the step, whatever the learning rate.
    """
    if decay is None:
        return list(groups)
    found = []
    for group in groups:
        members: dict[int, list[tuple[Any, str]]] = {}
        for parameter, name in zip(group["params"], group["names"]):
            members.setdefault(_find_depth(name, num_layers), []).append((parameter, name))
        for depth, chosen in sorted(members.items()):
            factor = decay ** (num_layers + 1 - depth)
            found.append(
                {
                    **group,
                    "params": [parameter for parameter, _ in chosen],
                    "names": [name for _, name in chosen],
                    "weight_decay": group["weight_decay"] / (factor if decoupled else 1),
                    "lr": group["lr"] * factor,
                    "lr_factor": group["lr_factor"] * factor,
                }
            )
    return found


def _find_depth(name: str, num_layers: int) -> int:
    """0 for embeddings, 1 for the first block, `num_layers + 1` for what comes after the last one."""
    found = _BLOCK.search(name)
    if found is not None:
        return 1 + int(found[1])
    return 0 if "embedding" in name else num_layers + 1


def _partition(apart: set[str]) -> list[tuple[str, ...]]:
    """The roles of each group: those `apart` alone, the decayed and the others of the rest together."""
    alone = [(role,) for role in ROLES if role in apart]
    together = (
        tuple(role for role in ROLES if role not in apart and (role in DECAYED) == decayed) for decayed in (True, False)
    )
    parts = [*alone, *(roles for roles in together if roles)]
    return sorted(parts, key=lambda roles: ROLES.index(roles[0]))


def list_decayed(groups: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Names of the weights whose role decays, and of the others."""
    names: tuple[list[str], list[str]] = ([], [])
    for group in groups:
        names[0 if group["roles"][0] in DECAYED else 1].extend(group["names"])
    return names


def regroup_state(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A saved state dict as one of an optimizer of the same kind with `groups`: state follows the names of weights,
    and the settings (weight decay, betas, eps) are those of `groups`."""
    old = {
        name: saved["state"][index]
        for group in saved["param_groups"]
        for name, index in zip(group["names"], group["params"], strict=True)
        if index in saved["state"]
    }
    state: dict[int, Any] = {}
    described = []
    index = 0
    for group in groups:
        names = group["names"]
        state |= {index + i: old[name] for i, name in enumerate(names) if name in old}
        others = {key: value for key, value in group.items() if key != "params"}
        described.append({**others, "params": list(range(index, index + len(names)))})
        index += len(names)
    return {"state": state, "param_groups": described}
