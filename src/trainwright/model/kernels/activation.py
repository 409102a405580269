"""Activations and the gated product. Owns their memory: a gated SiLU keeps its two inputs and nothing else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainwright.model.config import Activation


def activate(name: Activation, x: Tensor) -> Tensor:
    """silu, relu, gelu by the error function, or gelu_tanh: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    if name == "silu":
        return F.silu(x)
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up; silu(gate) is computed again in the backward pass, so one [.., I] tensor less is kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])


def gated(name: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up (Shazeer 2020), same shape and dtype as both."""
    if name == "silu" and not torch.compiler.is_compiling():  # which decides itself what to compute again
        return _GatedSilu.apply(gate, up)
    return activate(name, gate) * up
