"""Updates within the backward pass: a layer's weights take their step as soon as their gradients are whole.

The gradients of one layer exist at a time instead of all of them, which is as much memory as the weights in the compute
type (the idea is Lv et al. 2023, "Full parameter fine-tuning for large language models with limited resources"). What
needs all gradients at once is not to be had: clipping by their norm, sums over micro batches, a loss scale that turns
out too large. The norm is still reported.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainwright.parallel.mesh import World
from trainwright.parallel.shard import grad_norm
from trainwright.train.optimizer import Optimizers


class InBackward:
    """Steps each part of `optimizers` when all of its gradients have come; between `begin` and `finish` only, so that a
    pass which looks for NaN changes nothing."""

    def __init__(self, optimizers: Optimizers, world: World) -> None:
        self.world = world
        self.groups = [_Group(Optimizers([part], optimizers.names), self) for part in optimizers.parts]
        self.active = False
        self.squares: list[Tensor] = []

    def begin(self) -> None:
        """The coming backward pass updates."""
        self.active, self.squares = True, []

    def finish(self) -> Tensor:
        """Updates what a pass has left (a layer of which some weight got no gradient) and returns the norm of all
        gradients, float32 [] on the device."""
        for group in self.groups:
            group.update()
        self.active = False
        return torch.stack(self.squares).sum().sqrt()


class _Group:
    """The weights of one optimizer, which are updated together."""

    def __init__(self, optimizer: Optimizers, owner: InBackward) -> None:
        self.optimizer, self.owner = optimizer, owner
        self.weights = optimizer.parameters
        self.missing = len(self.weights)
        for weight in self.weights:
            weight.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, _: Tensor) -> None:
        if not self.owner.active:
            return
        self.missing -= 1
        if self.missing == 0:
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """One step, unless a gradient is NaN or infinite; then the gradients are dropped."""
        self.missing = len(self.weights)
        if all(weight.grad is None for weight in self.weights):
            return
        norm = grad_norm(self.weights, self.owner.world)
        self.owner.squares.append(norm.square())
        bad = 1 - norm.isfinite().float()
        if self.optimizer.guards_itself or not bad.item():
            self.optimizer.step(torch.ones_like(norm), bad)
        self.optimizer.zero_grad()
