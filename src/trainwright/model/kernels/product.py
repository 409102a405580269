"""Matrix products of float32 on a CPU: oneDNN's where torch's own library leaves half of the processor unused.

torch takes float32 products from Intel's MKL, which runs its AVX2 code on other makers' processors. On an AMD EPYC with
AVX-512, one thread, SmolLM2's shapes at 512 tokens, forward and both gradients: MKL 91 to 118 GFLOP/s, oneDNN 133 to
259, on operands as they lie. The same arithmetic, summed in another order. Compiled layers keep the compiler's choice.

Owns the choice and the operation with its gradient. Other devices and types have their own libraries.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST = 2**24
"""Multiplications of the smallest product that is worth the way through Python, some 20 us."""


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b, [..., I] -> [..., O], by the fastest library for it.

    Without gradients by torch's own: what a model says is held beside other programs to the last digits (SmolLM2's
    logits differ by 1.2e-4 between the two libraries).
    """
    if torch.is_grad_enabled() and _quicker(x, weight_OI, x.numel() * weight_OI.shape[0]):
        return _Linear.apply(x, weight_OI, bias_O)
    return F.linear(x, weight_OI, bias_O)


def matmul(a_MK: Tensor, b_KN: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a @ b likewise, without a gradient."""
    if not _quicker(a_MK, b_KN, a_MK.numel() * b_KN.shape[1]):
        return torch.mm(a_MK, b_KN, out=out)
    product = _onednn(a_MK, b_KN.t())
    return product if out is None else out.copy_(product)


def add_matmul(total_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """total += a @ b likewise; returns it."""
    if _quicker(a_MK, b_KN, a_MK.numel() * b_KN.shape[1]):
        return total_MN.add_(_onednn(a_MK, b_KN.t()))
    return total_MN.addmm_(a_MK, b_KN)


def describe() -> str:
    """For `trainwright doctor`."""
    return "oneDNN" if prefers_onednn() else "torch's own"


@cache
def prefers_onednn() -> bool:
    """Whether this is a processor whose widest units MKL leaves alone."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _processor()


def _processor() -> str:
    """What Linux says of the first processor; nothing elsewhere."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            return next((line for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        return ""


def _quicker(a: Tensor, b: Tensor, multiplications: int) -> bool:
    if torch.compiler.is_compiling() or a.device.type != "cpu" or not a.dtype == b.dtype == torch.float32:
        return False
    return multiplications >= LEAST and prefers_onednn()


def _onednn(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight_OI if of_x else None)
        return _onednn(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        grad_MO = grads[0].flatten(0, -2)
        return (
            None if weight_OI is None else _onednn(grads[0], weight_OI.t()),
            None if x is None else _onednn(grad_MO.t(), x.flatten(0, -2).t()),
            grad_MO.sum(0) if ctx.needs_input_grad[2] else None,
        )
