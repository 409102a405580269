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
from functools import lru_cache
from typing import Any, Literal

from trainwright.model.config import ModelConfig, linears
from trainwright.model.shapes import parameter_shapes

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
    quantization: Any = None
    trained: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@lru_cache(maxsize=16)
def parameters(config: ModelConfig, frozen: tuple[str, ...] = ()) -> tuple[Parameter, ...]:
    """All of them. `frozen`: patterns of names that stay fixed; with adapters, only the adapters are trained."""
    leaves = dict(linears(config))
    adapted = any(leaf.adapter is not None for leaf in leaves.values())
    found = []
    for name, shape in parameter_shapes(config).items():
        module, _, leaf = name.rpartition(".")
        linear = leaves.get(module)
        quantization = linear.quantization if linear is not None and leaf == "weight" else None
        trained = not adapted and not any(fnmatchcase(name, pattern) for pattern in frozen)
        cut, units = _cut(config, module, leaf, len(shape))
        found.append(Parameter(name, shape, _kind(name), _layer(name), cut, units, quantization, trained))
    return (*found, *_adapters(config, leaves))


def _adapters(config: ModelConfig, leaves: dict[str, Any]) -> Iterator[Parameter]:
    """The two small matrices of each adapted linear: A follows the cut of the input, B that of the output."""
    for module, leaf in leaves.items():
        if leaf.adapter is None:
            continue
        cut, units = _cut(config, module, "weight", 2)
        shapes = {"lora_a": (leaf.adapter.rank, leaf.in_features), "lora_b": (leaf.out_features, leaf.adapter.rank)}
        for index, (name, shape) in enumerate(shapes.items()):
            own = cut if cut == 1 - index else None
            yield Parameter(
                f"{module}.{name}.weight", shape, "adapter", _layer(module), own, units if own == 0 else None
            )


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


def tensor_piece(item: Parameter, tp: int) -> tuple[int, ...]:
    """The shape that one tensor parallel rank holds: the largest piece, where the cut is uneven."""
    if tp == 1 or item.cut is None:
        return item.shape
    size = item.shape[item.cut]
    units = item.units or size
    piece = size // units * -(-units // tp)
    return tuple(piece if dim == item.cut else length for dim, length in enumerate(item.shape))


def shard_piece(shape: tuple[int, ...], shards: int) -> int:
    """Elements that FSDP keeps of a tensor: ceil(dim 0 / shards) rows, padding included (FSDP2's `fully_shard`)."""
    return -(-shape[0] // shards) * math.prod(shape[1:])
