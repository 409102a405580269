"""Every parameter by name and shape, what it is, whether it is trained, and the piece that one rank holds. No torch.

Names and shapes are `model/shapes.py`'s, adapters come from the leaves of the tree. Owns which dimension each axis cuts
(the rules of `parallel/`): pipeline stages take whole layers, tensor parallel cuts heads, inner width and vocabulary,
expert parallel the stack of experts, FSDP dimension 0 of what is left, into equal pieces with padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

from trainwright.adapt.lora import Lora
from trainwright.adapt.quantize import FewerBits
from trainwright.errors import UserError
from trainwright.model.config import ModelConfig, MoeConfig, linears
from trainwright.model.shapes import parameter_shapes
from trainwright.parallel.layout import Layout, check_model
from trainwright.parallel.split import PartCosts, estimate_costs, split_layers

Kind = Literal["embedding", "attention", "mlp", "router", "experts", "norm", "head", "adapter"]

# The dimension of a weight that tensor parallel cuts, by the name of its layer; a bias is cut with dimension 0 only,
# because one that is added after a sum over ranks is whole on each.
CUTS = {
    "embed_tokens": 0, "q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 0, "up_proj": 0,
    "down_proj": 1, "lm_head": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One weight or bias. `layer`: None outside of the layers. `cut`: the dimension that tensor parallel splits.

    `units`: the cut dimension is so many heads, which are not split further: a degree beyond it holds copies.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    layer: int | None = None
    cut: int | None = None
    units: int | None = None
    quantization: FewerBits | None = None
    trained: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class ModelParts:
    """A model and all that no layout changes about it: counted once, shared by every job of a search.

    frozen: patterns of names that stay fixed; with adapters, only the adapters are trained.
    """

    def __init__(self, config: ModelConfig, frozen: tuple[str, ...] = ()) -> None:
        self.config, self.frozen = config, frozen
        self._costs: dict[tuple[int, str], PartCosts] = {}
        self._splits: dict[tuple[Any, ...], tuple[range, ...]] = {}
        self.clocked: dict[tuple[Any, ...], PartCosts] = {}
        """Costs of parts by the clock, as `build.py` estimates them; for it to keep."""
        self._refusals: dict[tuple[Any, ...], UserError | None] = {}

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        return parameters(self.config, self.frozen)

    @cached_property
    def by_layer(self) -> dict[int | None, tuple[Parameter, ...]]:
        """Parameters of each layer; None: those outside of the layers."""
        found: dict[int | None, list[Parameter]] = {None: []}
        for item in self.parameters:
            found.setdefault(item.layer, []).append(item)
        return {layer: tuple(items) for layer, items in found.items()}

    @cached_property
    def kinds(self) -> dict[int, int]:
        """Layer -> the first layer that is like it in shape and in what is trained."""
        first: dict[tuple[object, ...], int] = {}
        found = {}
        for layer, block in enumerate(self.config.layers):
            key = (block, tuple(item.trained for item in self.by_layer.get(layer, ())))
            found[layer] = first.setdefault(key, layer)
        return found

    @cached_property
    def trained(self) -> frozenset[str]:
        """Names of what is trained."""
        return frozenset(item.name for item in self.parameters if item.trained)

    def costs(self, seq_len: int, recompute: str) -> PartCosts:
        """What each part costs in FLOPs, as training estimates it where it does not look at the clock."""
        key = (seq_len, recompute)
        if key not in self._costs:
            self._costs[key] = estimate_costs(self.config, seq_len, recompute)
        return self._costs[key]

    def split(self, costs: PartCosts, stages: int, counts: tuple[int, ...] | None, per_rank: int) -> tuple[range, ...]:
        """The layers of each pipeline stage."""
        key = (costs, stages, counts)
        if key not in self._splits:
            self._splits[key] = split_layers(costs, stages, counts, per_rank)
        return self._splits[key]

    def check(self, layout: Layout, seq_len: int, kv_replication: bool) -> None:
        """Raises UserError where this model cannot be spread like this (`parallel/layout.py`)."""
        key = (layout.tp, layout.cp, layout.ep, seq_len, kv_replication)
        if key not in self._refusals:
            self._refusals[key] = None
            try:
                check_model(layout, self.config, seq_len, kv_replication=kv_replication)
            except UserError as error:
                self._refusals[key] = error
        if (refused := self._refusals[key]) is not None:
            raise refused


def parameters(config: ModelConfig, frozen: tuple[str, ...] = ()) -> tuple[Parameter, ...]:
    """All of them. `frozen`: patterns of names that stay fixed; with adapters, only the adapters are trained."""
    leaves = dict(linears(config))
    adapted = any(leaf.adapter is not None for leaf in leaves.values())
    found = []
    for name, shape in parameter_shapes(config).items():
        module, _, leaf = name.rpartition(".")
        part = leaves.get(module) or getattr(config, module, None)
        quantization = getattr(part, "quantization", None) if leaf == "weight" else None
        trained = not adapted and not any(fnmatchcase(name, pattern) for pattern in frozen)
        cut, units = _cut(config, module, leaf, len(shape))
        found.append(Parameter(name, shape, _kind(name), _layer(name), cut, units, quantization, trained))
    return (*found, *_adapters(config, leaves))


def _adapters(config: ModelConfig, leaves: dict[str, Any]) -> Iterator[Parameter]:
    """The small matrices of each adapted linear: A follows the cut of the input, B that of the output."""
    for module, leaf in leaves.items():
        lora = leaf.adapter
        if not isinstance(lora, Lora):
            continue
        stack = _experts_at(config, module)
        dims = len(stack) + 2
        cut, units = _cut(config, module, "weight", dims)
        column = cut == dims - 2
        a, b = (*stack, lora.rank, leaf.in_features), (*stack, leaf.out_features, lora.rank)
        layer = _layer(module)
        yield Parameter(f"{module}.lora_a", a, "adapter", layer, None if column else cut)
        yield Parameter(f"{module}.lora_b", b, "adapter", layer, cut if column else None, units if column else None)
        if lora.dora:
            rows = (cut, units) if column else (None, None)
            yield Parameter(f"{module}.magnitude", (leaf.out_features,), "adapter", layer, *rows)


def _experts_at(config: ModelConfig, module: str) -> tuple[int, ...]:
    """(number of experts,) where a linear layer stands for a stack of them."""
    if ".experts." not in module:
        return ()
    mlp = config.layers[int(module.split(".")[1])].mlp
    return (mlp.experts.num_experts,) if isinstance(mlp, MoeConfig) else ()


def _layer(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("layers.") else None


def _kind(name: str) -> Kind:
    if "norm" in name.split(".")[-2]:
        return "norm"
    if not name.startswith("layers."):
        return "head" if name.startswith(("lm_head", "project_out")) else "embedding"
    if ".experts." in name:
        return "experts"
    if ".mlp.gate." in name:
        return "router"
    return "attention" if ".self_attn." in name else "mlp"


def _cut(config: ModelConfig, module: str, leaf: str, dims: int) -> tuple[int | None, int | None]:
    """(the dimension that tensor parallel cuts, into how many heads it may be cut)."""
    name = module.rpartition(".")[2]
    cut = CUTS.get(name)
    if cut is None or (leaf == "bias" and cut == 1):
        return None, None
    if dims == 3:  # experts are stacked in front
        return cut + 1, None
    layer = _layer(module)
    if layer is None or name not in ("q_proj", "k_proj", "v_proj", "o_proj"):
        return cut, None
    attention = config.layers[layer].self_attn
    return cut, attention.num_kv_heads if name in ("k_proj", "v_proj") else attention.num_heads


def tensor_piece(item: Parameter, tp: int, rank: int = 0) -> tuple[int, ...]:
    """The shape that a tensor parallel rank holds. KV heads that the degree does not divide are whole on every rank."""
    if tp == 1 or item.cut is None or (item.units is not None and item.units % tp):
        return item.shape
    own = piece(item.shape[item.cut], tp, rank)
    return tuple(own if dim == item.cut else length for dim, length in enumerate(item.shape))


def piece(length: int, ranks: int, rank: int = 0) -> int:
    """How much of a length a rank holds: ceil(length / ranks), the last ones less or nothing (torch.chunk)."""
    most = -(-length // ranks)
    return max(0, min(most, length - rank * most))
