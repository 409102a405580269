"""A linear layer whose three matrix products run in 8-bit floats, its weight and everything else in the wider type.

Owns the scaling of operands and the products. Every operand is scaled, each time anew, so that its largest number is
the format's largest (Micikevicius et al. 2022, "FP8 formats for deep learning", section 3.2):

    tensorwise   one scale an operand; gradients in e5m2, which has more range; the fastest
    rowwise      one scale a row of what is summed over; all in e4m3; closer to bf16

Weights that are fixed and kept in 8 bits are `quantized.py`'s. Devices without such products multiply the rounded
operands in float32: the same numbers, no faster.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Scaling = Literal["tensorwise", "rowwise"]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_MULTIPLE = 16  # of each dim, which the matrix units need
_LEAST = 1e-12  # of a tensor's largest number, so that zeros have a scale


def fits(x: Tensor, weight_OI: Tensor) -> bool:
    """Whether the products of this layer can be done: every dim, the number of tokens too, in 16s."""
    tokens = x.numel() // x.shape[-1]
    return all(size % _MULTIPLE == 0 for size in (tokens, *weight_OI.shape))


def has_products(device: torch.device) -> bool:
    """Whether this device multiplies 8-bit floats: CUDA from compute capability 8.9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def rounded(x: Tensor, dtype: torch.dtype, dim: int | None) -> tuple[Tensor, Tensor]:
    """(x in 8 bits, what to multiply it by to have x back): one float32 scale, or one for each slice along `dim`."""
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    factor = torch.finfo(dtype).max / largest.float().clamp(min=_LEAST)
    limit = torch.finfo(dtype).max
    return (x.float() * factor).clamp(-limit, limit).to(dtype), factor.reciprocal()


def _product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """a [M, K] @ b [K, N] of rounded operands. The matrix units read rows of a and columns of b."""
    if a.device.type != "cuda":
        wide = (a.float() * scale_a) @ (b.float() * scale_b)
        return wide if dtype == torch.float32 else wide.to(dtype)  # compiled, a cast of nothing loses the gradient
    a, b = a.contiguous(), b.t().contiguous().t()
    return torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=dtype, use_fast_accum=fast)


class _Tensorwise(torch.autograd.Function):
    """Keeps the input in 8 bits. The weight is kept as it came, since sharded weights are gathered again anyway."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_OI: Tensor) -> Tensor:
        x8_MI, scale_x = rounded(x_MI, E4M3, None)
        w8_OI, scale_w = rounded(weight_OI, E4M3, None)
        ctx.save_for_backward(x8_MI, scale_x, weight_OI)
        ctx.dtype = x_MI.dtype
        return _product(x8_MI, w8_OI.t(), scale_x, scale_w, x_MI.dtype, True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x8_MI, scale_x, weight_OI = ctx.saved_tensors
        g8_MO, scale_g = rounded(grads[0], E5M2, None)
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            w8_OI, scale_w = rounded(weight_OI, E4M3, None)
            grad_x = _product(g8_MO, w8_OI, scale_g, scale_w, ctx.dtype, False)
        if ctx.needs_input_grad[1]:
            grad_w = _product(g8_MO.t(), x8_MI, scale_g, scale_x, weight_OI.dtype, False)
        return grad_x, grad_w


class _Rowwise(torch.autograd.Function):
    """Each product sums over another dim, so each operand is rounded twice, from its wide form."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_MI, weight_OI)
        x8_MI, scale_M1 = rounded(x_MI, E4M3, 1)
        w8_OI, scale_O1 = rounded(weight_OI, E4M3, 1)
        return _product(x8_MI, w8_OI.t(), scale_M1, scale_O1.t(), x_MI.dtype, True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_MI, weight_OI = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            g8_MO, scale_M1 = rounded(grads[0], E4M3, 1)
            w8_OI, scale_1I = rounded(weight_OI, E4M3, 0)
            grad_x = _product(g8_MO, w8_OI, scale_M1, scale_1I, x_MI.dtype, True)
        if ctx.needs_input_grad[1]:
            g8_MO, scale_1O = rounded(grads[0], E4M3, 0)
            x8_MI, scale_1I = rounded(x_MI, E4M3, 0)
            grad_w = _product(g8_MO.t(), x8_MI, scale_1O.t(), scale_1I, weight_OI.dtype, True)
        return grad_x, grad_w


def float8_linear(x: Tensor, weight_OI: Tensor, scaling: Scaling) -> Tensor:
    """x W^T in x's dtype, x [..., I], where `fits(x, W)`; W in x's dtype. Both gradients are 8-bit products too."""
    kind = _Tensorwise if scaling == "tensorwise" else _Rowwise
    return kind.apply(x.flatten(0, -2), weight_OI).view(*x.shape[:-1], -1)


def describe(device: torch.device) -> str:
    """What `train.float8` multiplies with on this device, in words."""
    return "8-bit products" if has_products(device) else "emulated: rounded operands, float32 products"
