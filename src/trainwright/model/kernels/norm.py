"""RMSNorm and LayerNorm with statistics in float32. Owns the arithmetic, `norm.py` owns the weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (Zhang & Sennrich 2019), written out: the reference."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    """Keeps x and one number a row. Torch's own backward on a CPU keeps three wide tensors and is a third slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        grad, wide, width = grads[0].float(), x.float(), x.shape[-1]
        grad_x = grad_weight = None
        product = (grad * wide).reshape(-1, width)  # summed over rows, by `scale`, and over columns, by `weight`
        if ctx.needs_input_grad[1]:
            grad_weight = (product.t() @ scale.flatten()).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            mean = (product @ weight.float()).view(scale.shape).div_(-width).mul_(scale.square())
            del product
            grad_x = (grad * weight).addcmul_(wide, mean).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim, in x's dtype; torch's fused kernel where there is one."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _RmsNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dim, in x's dtype (torch keeps its statistics in float32)."""
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
