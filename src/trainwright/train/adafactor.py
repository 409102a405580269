"""Adafactor (Shazeer & Stern 2018, algorithm 4, no momentum): second moments of a matrix, one a row and one a column.

The same update as `torch.optim.Adafactor`, which does not step over sharded tensors: here sums over a sharded dim are
completed over the ranks, and every rank updates its own piece with its own rows' and columns' moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from trainwright.parallel.local import own_part

SMALLEST_RMS = 1e-3  # epsilon 2: a weight that is near zero still moves
CLIP = 1.0  # d: the largest root mean square of an update
DECAY = -0.8  # of the second moments: beta 2 is 1 - t^-0.8, section 7.2


class Adafactor(Optimizer):
    """The step is relative to the size of the weight (section 8): rate min(lr, 1 / sqrt(t)) times its RMS."""

    def __init__(self, params: Iterable[Any], lr: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.float(), group["lr"], group["weight_decay"])

    def _update(self, parameter: Tensor, grad: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        squares = grad.square()
        seen = (
            {"row_var": _mean(squares, -1), "col_var": _mean(squares, -2)} if grad.ndim > 1 else {"variance": squares}
        )
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=grad.device)
            state.update({name: torch.zeros_like(value) for name, value in seen.items()})
        state["step"] += 1
        fresh = state["step"] ** DECAY
        for name, value in seen.items():
            state[name].mul_(1 - fresh).add_(value * fresh)
        if grad.ndim > 1:
            rows, columns = state["row_var"], state["col_var"]
            least = torch.finfo(torch.float32).eps
            variance = rows * columns / _mean(rows, -2).clamp(min=least)
        else:
            variance = state["variance"]
        update = grad * variance.clamp(min=torch.finfo(torch.float32).eps ** 2).rsqrt()
        rate = (state["step"].rsqrt()).clamp(max=lr) * _rms(parameter.float()).clamp(min=SMALLEST_RMS)
        parameter.mul_(1 - lr * weight_decay)
        parameter.sub_(update * (rate / (_rms(update) / CLIP).clamp(min=1.0)))


def _mean(x: Tensor, dim: int) -> Tensor:
    """Over one dim, which is kept. Of a sum, since shards of a dim may have unequal lengths."""
    return _complete(x.sum(dim, keepdim=True)) / x.shape[dim]


def _rms(x: Tensor) -> Tensor:
    """Root mean square, the same plain number on every rank."""
    total = _complete(x.square().sum())
    return (own_part(total) / x.numel()).sqrt()


def _complete(x: Tensor) -> Tensor:
    """Sums that ranks hold in parts, added; every other placement stays."""
    if not isinstance(x, DTensor):
        return x
    return x.redistribute(placements=[Replicate() if place.is_partial() else place for place in x.placements])
