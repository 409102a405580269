"""Where a family's published modules and ours are the same linear layers, for names in targets and adapter files.

No torch at import. The table itself is the family's; this reads it for linear layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainwright.model import families
from trainwright.model.config import ModelConfig, linears
from trainwright.model.families.family import Weight


@dataclass(frozen=True)
class Group:
    """Published modules and ours that hold the same weight: one and one, one fused and its parts, or experts and
    their stack."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    weight: Weight


def linear_groups(config: ModelConfig) -> list[Group]:
    """Every linear layer of the model, router included, head left out; modules as transformers' classes call them.

    Some families publish files without the prefix that the class has (`h.0.` for `transformer.h.0.`): the longest of
    the family's prefixes is the class's.
    """
    family = families.get(config.family)
    prefix = max(family.prefixes, key=len)
    ours = {path for path, _ in linears(config)}
    groups = []
    for weight in family.weights(config):
        modules = tuple(name.removesuffix(".weight") for name in weight.ours)
        if weight.ours[0].endswith(".weight") and modules[0] in ours:
            theirs = tuple(prefix + name.removesuffix(".weight") for name in weight.theirs)
            groups.append(Group(theirs, modules, weight))
    return groups


def published_names(config: ModelConfig) -> dict[str, str]:
    """Our module path -> the published one that holds it; of experts, the first's."""
    return {ours: group.theirs[0] for group in linear_groups(config) for ours in group.ours}


def shortest_targets(chosen: set[str], every: set[str]) -> list[str]:
    """Module names for `target_modules`: the shortest endings of `chosen` paths that name no path beside them."""
    targets = set()
    for path in chosen:
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            ending = ".".join(parts[-length:])
            if all(other in chosen for other in every if other == ending or other.endswith(f".{ending}")):
                targets.add(ending)
                break
    return sorted(targets)
