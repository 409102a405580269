"""What a family is: how its config.json becomes our tree and back, and how its weights are named and laid out.

Owns the two-way map between published tensors and ours. No torch at import; files are checkpoint.py's work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from trainwright.model.config import ModelConfig
from trainwright.model.shapes import Shape, parameter_shapes

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["same", "blocks", "heads", "stack"]


@dataclass(frozen=True)
class Weight:
    """Some published tensors and the tensors of ours that hold the same numbers.

    same: one to one. blocks: one of theirs is ours one below the other. heads: likewise, but mixed head by head
    ([heads, parts, head_dim] rows). stack: one of ours [E, ...] is E of theirs. transposed: theirs is [in, out].
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    layout: Layout = "same"
    transposed: bool = False
    head_dim: int = 0

    def their_shape(self, our_shapes: Sequence[Shape]) -> Shape:
        """The shape that each published tensor must have."""
        first = our_shapes[0]
        if self.layout == "stack":
            shape = first[1:]
        else:
            shape = (sum(shape[0] for shape in our_shapes), *first[1:])
        return shape[::-1] if self.transposed else shape

    def to_ours(self, theirs: Sequence[Tensor], our_shapes: Sequence[Shape]) -> list[Tensor]:
        import torch

        if self.layout == "stack":
            return [torch.stack([t.t() if self.transposed else t for t in theirs])]
        whole = theirs[0].t() if self.transposed and theirs[0].dim() == 2 else theirs[0]
        if self.layout == "same":
            return [whole]
        if self.layout == "heads":
            mixed = whole.unflatten(0, (-1, len(self.ours), self.head_dim))
            return [mixed[:, part].flatten(0, 1) for part in range(len(self.ours))]
        return list(whole.split([shape[0] for shape in our_shapes]))

    def to_theirs(self, ours: Sequence[Tensor]) -> list[Tensor]:
        import torch

        if self.layout == "stack":
            parts = list(ours[0].unbind())
            return [(t.t() if self.transposed else t).contiguous() for t in parts]
        if self.layout == "heads":
            whole = torch.stack([t.unflatten(0, (-1, self.head_dim)) for t in ours], 1).flatten(0, 2)
        else:
            whole = torch.cat(list(ours)) if len(ours) > 1 else ours[0]
        return [(whole.t() if self.transposed and whole.dim() == 2 else whole).contiguous()]


@dataclass(frozen=True)
class Row:
    """One line of a family's name table, for modules: `.weight` and `.bias` follow where our module has them.

    `{n}` stands for the layer, `{e}` for the expert.
    """

    theirs: str
    ours: str | tuple[str, ...]
    layout: Layout = "same"
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """One family: two functions on config.json and a table of names.

    `prefixes`: what the published names may begin with; the first is written. `ignored`: patterns (fnmatch) of tensors
    that published files hold and that are no weights. `constants`: such tensors, name -> maker, that a save writes
    because the family's own code wants them.
    """

    name: str
    from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    rows: tuple[Row, ...]
    prefixes: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = ()
    constants: Callable[[ModelConfig], dict[str, Callable[[], Tensor]]] = field(default=lambda config: {})

    def weights(self, config: ModelConfig) -> list[Weight]:
        """Every tensor of a model of this family, in the order of the table."""
        shapes = parameter_shapes(config)
        found: list[Weight] = []
        for row in self.rows:
            for n in range(config.num_layers) if "{n}" in row.theirs else (0,):
                found += _expand(row, n, config, shapes)
        return found


def _expand(row: Row, n: int, config: ModelConfig, shapes: Mapping[str, Shape]) -> Iterable[Weight]:
    ours = (row.ours,) if isinstance(row.ours, str) else row.ours
    for kind in (".weight", ".bias"):
        names = tuple(name.format(n=n) + kind for name in ours)
        if names[0] not in shapes:
            continue
        theirs: tuple[str, ...] = (row.theirs.format(n=n, e="{e}") + kind,)
        if row.layout == "stack":
            theirs = tuple(theirs[0].format(e=e) for e in range(shapes[names[0]][0]))
        head_dim = config.layers[n].self_attn.head_dim if row.layout == "heads" else 0
        yield Weight(theirs, names, row.layout, row.transposed, head_dim)
