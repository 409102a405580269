"""torch's AdamW, whose update on a GPU is one kernel of ours (`triton_adamw.py`). States and settings are torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainwright.model.kernels import has_triton
from trainwright.parallel.local import own_part


class AdamW(torch.optim.AdamW):
    """Takes `grad_scale` and `found_inf` as torch's fused ones do: gradients are divided by the first, and where the
    second is 1 nothing changes. What the kernel does not take (a CPU, float64, strides) is torch's."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    _ours: bool | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        if self._ours is None:  # asked once: sharded parameters take the host some microseconds each
            self._ours = self._is_ours()
        if not self._ours:
            return super().step(closure)
        from trainwright.train.triton_adamw import update

        for group in self.param_groups:
            found: list[list[Tensor]] = [[] for _ in range(6)]
            self._init_group(group, *found)
            weights, grads, means, squares, _, steps = found
            if not weights:
                continue
            count_step(steps, self.found_inf)
            parts = [[own_part(tensor) for tensor in some] for some in (weights, grads, means, squares)]
            items = [item for item in zip(*parts, steps, strict=True) if item[0].numel()]  # of this rank
            settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            update([(w, g.contiguous(), m, s, n) for w, g, m, s, n in items], settings, self.grad_scale, self.found_inf)
        return None

    def _is_ours(self) -> bool:
        def fits(tensor: Tensor) -> bool:
            local = own_part(tensor)
            return local.is_cuda and local.is_contiguous() and local.dtype != torch.float64

        return has_triton() and all(group["fused"] and all(map(fits, group["params"])) for group in self.param_groups)


def count_step(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """One more step in every count, unless it is refused."""
    one = torch.ones_like(steps[0]) if found_inf is None else 1.0 - found_inf
    # A list: one tensor for all would be read by the host, which would wait for the whole backward pass.
    torch._foreach_add_(steps, [one] * len(steps))
