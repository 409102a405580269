"""Whole weights by name out of any layout, one at a time, for a model folder in its published format.

Owns finding the pipeline stage that holds a weight and bringing it to the ranks that write. Within a stage a DTensor
gathers itself. No rank ever holds more than the weight that was asked for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.model.checkpoint import clean_name
from trainwright.parallel.mesh import World


class WholeWeights:
    """`weights(name)` is a weight's whole tensor, on every rank. All ranks ask for the same names in the same order."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.world = world
        self.held = {clean_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
        self.given = {clean_name(n): m.give_weight for n, m in model.named_modules() if hasattr(m, "give_weight")}
        pp = world.axis("pp")
        self.line = pp.get_group() if pp is not None else None
        stages: list[list[str]] = [[]] if self.line is None else [[] for _ in range(dist.get_world_size(self.line))]
        if self.line is not None:
            dist.all_gather_object(stages, list(self.held), group=self.line)
        self.owner = {name: stage for stage, names in reversed(list(enumerate(stages))) for name in names}

    @torch.no_grad()
    def __call__(self, name: str) -> Tensor:
        if self.line is None:
            return self._own(name)
        owner = self.owner[name]
        mine = dist.get_rank(self.line) == owner
        whole = self._own(name).to(self.world.device).contiguous() if mine else None
        kind = [(tuple(whole.shape), whole.dtype) if whole is not None else None]
        source = dist.get_global_rank(self.line, owner)
        dist.broadcast_object_list(kind, source, group=self.line)
        assert kind[0] is not None
        if whole is None:
            whole = torch.empty(kind[0][0], dtype=kind[0][1], device=self.world.device)
        dist.broadcast(whole, source, group=self.line)
        return whole

    def _own(self, name: str) -> Tensor:
        """A weight of this stage; a layer that keeps it in another form gives it itself."""
        path, _, last = name.rpartition(".")
        if last == "weight" and path in self.given:
            return self.given[path]()
        tensor = self.held[name].detach()
        if not isinstance(tensor, DTensor):
            return tensor
        near: Any = tensor.to(self.world.device)  # masters may be in host memory
        return near.full_tensor()
