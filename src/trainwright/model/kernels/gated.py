"""The gated product of an MLP. Owns its memory: a gated SiLU keeps its two inputs and nothing else.

Names: M tokens, I the inner width.
"""

# No `from __future__ import annotations`: torch reads the operations' schemas from these annotations.
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from trainwright.model.config import Activation
from trainwright.model.kernels import has_triton
from trainwright.model.kernels.activation import activate


def gated(name: Activation, gate: Tensor, up: Tensor, *, again: bool = False) -> Tensor:
    """act(gate) * up (Shazeer 2020), same shape and dtype as both.

    again: whether a compiled layer will compute this again in its backward pass. Left to the compiler, the product and
    both gradients are made in one kernel, so that six tensors of this size exist at once; as operations of their own
    the product is gone when the gradients come, and one of these takes the place of the product's: four.
    """
    if name == "silu" and not torch.compiler.is_compiling():
        made: Tensor = _GatedSilu.apply(gate, up)
        return made
    return gated_silu(gate, up) if name == "silu" and again else activate(name, gate) * up


class _GatedSilu(torch.autograd.Function):
    """silu(gate) is computed again in the backward pass, so one [.., I] tensor less is kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return kernels.product(gate, up) if (kernels := _kernels(gate, up)) else F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if kernels := _kernels(grads[0], gate, up):
            both: tuple[Tensor, Tensor] = kernels.gradients(grads[0], gate, up)
            return both
        return torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])


@custom_op("trainwright::gated_silu", mutates_args=())
def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, rounded once."""
    if kernels := _kernels(gate, up):
        made: Tensor = kernels.product(gate, up)
        return made
    return (F.silu(gate.float()) * up).to(gate.dtype)


@custom_op("trainwright::gated_silu_gradients", mutates_args=("grad",))
def gated_silu_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The gradient of `up`; that of `gate` takes the place of the product's, `grad`."""
    if kernels := _kernels(grad, gate, up):
        of_up: Tensor = kernels.gradients(grad, gate, up, over=True)[1]
        return of_up
    wide = gate.float()
    of_up = (F.silu(wide) * grad).to(up.dtype)
    grad.copy_(torch.ops.aten.silu_backward(grad.float() * up, wide))
    return of_up


def _kernels(*tensors: Tensor) -> ModuleType | None:
    """Our Triton kernels, where these tensors can take them."""
    alike = all(tensor.is_contiguous() and tensor.dtype != torch.float64 for tensor in tensors)
    if not (alike and tensors[0].is_cuda and has_triton()):
        return None
    from trainwright.model.kernels import triton_gated

    return triton_gated


@gated_silu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@gated_silu_gradients.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(up)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    # Only compiled layers come here, in which nothing else reads this gradient.
    of_up = gated_silu_gradients(grad, *ctx.saved_tensors)
    return grad, of_up


gated_silu.register_autograd(_backward, setup_context=_keep)
