"""Lion (Chen et al. 2023, algorithm 2): one moment, and the sign of it is the step. Half of AdamW's state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class Lion(Optimizer):
    """Good learning rates are 3 to 10 times smaller than AdamW's, good weight decays as many times larger."""

    def __init__(self, params: Iterable[Any], lr: float = 0.0, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient, all of a group at once."""
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not trained:
                continue
            for parameter in trained:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            grads = [parameter.grad.float() for parameter in trained]
            moments = [self.state[parameter]["exp_avg"] for parameter in trained]
            beta1, beta2 = group["betas"]
            direction = torch._foreach_lerp(grads, moments, beta1)
            torch._foreach_sign_(direction)
            torch._foreach_mul_(trained, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(trained, direction, alpha=-group["lr"])
            torch._foreach_lerp_(moments, grads, 1 - beta2)
