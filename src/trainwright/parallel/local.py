"""Parameters that are DTensors to everyone, and this rank's plain tensors inside their module's forward.

Checkpoints, clipping, FSDP and the optimizer see global shapes; kernels see what they take. Owns how one parameter lies
on an axis, that exchange, and the sum of gradients of which each rank saw a part. What lies how is the table's to say
(`tensor.py`, `expert.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Place:
    """How one parameter lies on the tp axis.

    dim: split along it, or every rank holds all of it (None). partial: this rank's work sees a part of the tokens or
    heads, so its gradient is a part of a sum. once: added before such a sum, so only the first rank adds it.
    spans: of a whole parameter this rank uses these (start, length) stretches of dim 0.
    """

    dim: int | None = None
    partial: bool = False
    once: bool = False
    spans: tuple[tuple[int, int], ...] | None = None

    @property
    def placement(self) -> Placement:
        return Replicate() if self.dim is None else Shard(self.dim)


def distribute(parameter: nn.Parameter, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> nn.Parameter:
    """The parameter as a DTensor; each rank keeps its own part of what it holds, and nobody talks."""
    whole = distribute_tensor(parameter.data, mesh, placements, src_data_rank=None)
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


@dataclass(frozen=True)
class View:
    """A DTensor parameter as the plain tensor that this rank computes with.

    partial: its gradient is a part of a sum over the tp axis, which `sum_partial_gradients` makes once a step.
    """

    partial: bool = False
    spans: tuple[tuple[int, int], ...] | None = None
    silent: bool = False

    @classmethod
    def of(cls, place: Place, mesh: DeviceMesh) -> View:
        return cls(place.partial, place.spans, place.once and mesh.get_local_rank() != 0)

    def __call__(self, parameter: Tensor) -> Tensor:
        local = own_part(parameter)
        if self.spans is not None:
            parts = [local.narrow(0, start, length) for start, length in self.spans]
            local = parts[0] if len(parts) == 1 else torch.cat(parts)
        return local * 0 if self.silent else local


class LocalWeights(nn.Module):
    """Mixed into a module's class: inside forward its parameters are this rank's plain tensors."""

    _views: dict[str, View]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        held = self._parameters
        local: Any = {name: None if p is None else self._views[name](p) for name, p in held.items()}
        self._parameters = local
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._parameters = held


def sum_partial_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Adds up, over the ranks of `mesh` (tp), the gradients of weights of which each rank saw a part of the work.

    All of them in one message, after a step's last backward pass: FSDP would send each alone, in every pass, and wait.
    """
    grads: dict[int, Tensor] = {}
    for module in model.modules():
        for name, view in module._views.items() if isinstance(module, LocalWeights) else ():
            parameter = module._parameters[name]
            if view.partial and parameter is not None and parameter.grad is not None:
                grad = parameter.grad
                grads[id(parameter)] = own_part(grad)
    if not grads:
        return
    held = list(grads.values())
    flat = torch.cat([grad.flatten() for grad in held])
    flat = flat.to(mesh.device_type)  # gradients may be in host memory
    dist.all_reduce(flat, group=mesh.get_group())
    for grad, total in zip(held, flat.split([grad.numel() for grad in held]), strict=True):
        grad.copy_(total.view_as(grad))


@cache
def _local_class(kind: Any) -> Any:
    """The same class with its weights viewed locally, made once."""
    return type(f"Local{kind.__name__}", (LocalWeights, kind), {})


def view_locally(module: nn.Module, views: dict[str, View]) -> None:
    """Gives the module's forward plain tensors; everyone else still sees DTensors under the same names."""
    local: Any = module
    local.__class__ = _local_class(local.__class__)
    local._views = views
