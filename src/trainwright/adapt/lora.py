"""Low-rank adapters (Hu et al. 2021) as a rewrite of the config tree before the build. No torch.

Owns what an adapter is (rank, scale, variants) and which linear layers get one. The modules are `linear.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from trainwright.adapt.quantize import is_router
from trainwright.errors import UserError
from trainwright.model.config import LinearConfig, ModelConfig, linears, map_linears
from trainwright.recipe.model import PLAIN_STARTS

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Lora:
    """y = W x + scale B A x, with A [rank, in] and B [out, rank] trained and W fixed.

    rslora: scale alpha / sqrt(rank) (Kalajdzievski 2023). dora: rows of W + scale B A get a trained length
    (Liu et al. 2024, equation 5; its norm takes no gradient, section 4.3).
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: str = "kaiming"
    """How A and B begin: `setup.start_adapters` and `starts.py`."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def from_base(self) -> bool:
        """Whether A and B begin as a part of the base (`starts.py`), not with B at zero."""
        return self.init not in PLAIN_STARTS

    def num_parameters(self, linear: LinearConfig) -> int:
        return self.rank * (linear.in_features + linear.out_features) + (linear.out_features if self.dora else 0)

    def build(self, linear: LinearConfig, num_experts: int | None = None) -> Any:
        """The adapted linear layer; a stack of them, each with its own A and B, for experts."""
        from trainwright.adapt.linear import LoraExperts, LoraLinear

        return LoraLinear(linear, self) if num_experts is None else LoraExperts(linear, self, num_experts)


def add_adapters(
    config: ModelConfig,
    lora: Lora,
    targets: str | Iterable[str] = ALL_LINEAR,
    *,
    overrides: Mapping[str, Lora] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> ModelConfig:
    """The tree with an adapter on every linear layer that `targets` names.

    targets: all-linear (every linear layer but routers and the head), names (`q_proj`, `self_attn.q_proj`, or the
    family's published ones, such as `c_attn`), or patterns with * over whole paths (`layers.1?.mlp.*`).
    `overrides`: path -> an adapter of its own. `aliases`: path -> the published path of the same layer.
    Raises UserError when a target names nothing.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    published = aliases or {}
    found: dict[str, Lora] = {}
    for target in wanted:
        paths = [path for path, _ in linears(config) if _names(target, path, published.get(path))]
        if not paths:
            raise UserError(
                f"adapter.targets: {target!r} names no linear layer of this model: use all-linear, a pattern with *, "
                f"or some of {', '.join(_leaf_names(config))}"
            )
        found |= dict.fromkeys(paths, lora)
    found |= overrides or {}
    put: Callable[[str, LinearConfig], LinearConfig] = lambda path, linear: (  # noqa: E731
        replace(linear, adapter=found[path]) if path in found else linear
    )
    adapted: ModelConfig = map_linears(config, put)
    return adapted


def _names(target: str, path: str, published: str | None) -> bool:
    if target == ALL_LINEAR:
        return not is_router(path)
    if "*" in target or "?" in target:
        return fnmatchcase(path, target)
    return any(name == target or name.endswith(f".{target}") for name in (path, published) if name)


def _leaf_names(config: ModelConfig) -> list[str]:
    return sorted({path.rpartition(".")[2] for path, _ in linears(config)})
