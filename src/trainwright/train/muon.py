"""Muon (Jordan et al. 2024): the momentum, made orthogonal by Newton-Schulz iterations, is the step. One moment.

`torch.optim.Muon` has the same arithmetic, one matrix after another and always in bfloat16, which a processor without
bfloat16 units emulates: a step of the quickstart took 1.5 s there. Here matrices of one shape go through the iterations
together, in float32 on a processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

# Jordan et al. 2024: the quintic that grows small singular values fastest. Five rounds bring all of them near 1.
A, B, C = 3.4445, -4.7750, 2.0315
ROUNDS = 5
BATCH_ELEMENTS = 2**24  # of matrices that go together: larger ones keep a device busy alone


class Muon(Optimizer):
    """For matrices inside a model's layers. Updates have AdamW's size (Liu et al. 2025, "Muon is scalable", section
    2.2), so learning rates and decays are AdamW's too."""

    def __init__(self, params: Iterable[Any], momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient, with Nesterov's momentum."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            directions = []
            for parameter in trained:
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                directions.append(parameter.grad.lerp(state["momentum_buffer"], momentum))
            for indices in alike(directions):
                for index, step in zip(indices, orthogonal([directions[i] for i in indices]), strict=True):
                    parameter = trained[index]
                    parameter.mul_(1 - rate * group["weight_decay"])
                    parameter.add_(step, alpha=-rate * 0.2 * max(parameter.shape) ** 0.5)


def alike(matrices: list[Tensor]) -> Iterator[list[int]]:
    """Places of the matrices that go together: one shape, one device; what is spread over ranks goes alone."""
    groups: dict[Any, list[int]] = {}
    for index, matrix in enumerate(matrices):
        alone = index if isinstance(matrix, DTensor) else None
        groups.setdefault((matrix.shape, matrix.device, alone), []).append(index)
    for indices in groups.values():
        many = max(1, BATCH_ELEMENTS // matrices[indices[0]].numel())
        yield from (indices[first : first + many] for first in range(0, len(indices), many))


def orthogonal(matrices: list[Tensor]) -> Iterable[Tensor]:
    """The orthogonal matrix next to each [R, C] matrix, nearly: singular values become 0.7 to 1.2."""
    dtype = torch.float32 if matrices[0].device.type == "cpu" else torch.bfloat16
    x = torch.stack(matrices).to(dtype) if len(matrices) > 1 else matrices[0].to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    product = torch.baddbmm if x.ndim == 3 else torch.addmm
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = product(x, product(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    x = x.mT if tall else x
    return x.unbind() if len(matrices) > 1 else [x]
