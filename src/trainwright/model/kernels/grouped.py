"""A matmul for each expert over its own tokens. Owns the choice between torch's grouped kernel and a loop."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainwright.model.kernels.cast import cast
from trainwright.model.kernels.product import linear, matmul


def has_grouped_mm(x: Tensor) -> bool:
    """Whether torch's grouped kernel takes this: bf16 on CUDA since compute capability 8.0, dims multiples of 8."""
    return x.device.type == "cuda" and x.dtype == torch.bfloat16 and x.shape[-1] % 8 == 0


def grouped_linear(x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """[M, O]: the first counts[0] rows by expert 0's weight, the next counts[1] by expert 1's, and so on.

    The loop reads the counts on the host, which waits for an accelerator; the grouped kernel never does.
    """
    if has_grouped_mm(x_MI) and weight_EOI.shape[1] % 8 == 0:
        offsets = counts_E.cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x_MI, weight_EOI.transpose(-2, -1), offs=offsets)
    parts = x_MI.split(counts_E.tolist())
    return torch.cat([linear(part, weight) for part, weight in zip(parts, weight_EOI, strict=True)])


def cast_grouped_linear(x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """`grouped_linear` of a weight of another type, cast to that of x here and once more in the backward pass: what is
    kept is the weight itself, which is there anyway. A float32 master would leave 2 bytes more a weight else."""
    return _Cast.apply(x_MI, weight_EOI, counts_E)


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_MI if ctx.needs_input_grad[1] else None, weight_EOI, counts_E)
        return grouped_linear(x_MI, weight_EOI.to(x_MI.dtype), counts_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_MI, weight_EOI, counts_E = ctx.saved_tensors
        of_x, of_weight, _ = ctx.needs_input_grad
        grad_MO, of = grads[0].contiguous(), None
        if of_x:
            of = grouped_linear(grad_MO, weight_EOI.to(grad_MO.dtype).transpose(1, 2), counts_E)
        return of, cast(_of_weight(grad_MO, x_MI, counts_E), weight_EOI.dtype) if of_weight else None, None


def _of_weight(grad_MO: Tensor, x_MI: Tensor, counts_E: Tensor) -> Tensor:
    """The gradient of `grouped_linear`'s weight, [E, O, I], in x's type."""
    if has_grouped_mm(x_MI) and grad_MO.shape[1] % 8 == 0:
        return F.grouped_mm(grad_MO.t(), x_MI, offs=counts_E.cumsum(0, dtype=torch.int32))
    counts = counts_E.tolist()
    parts = zip(grad_MO.split(counts), x_MI.split(counts), strict=True)
    return torch.stack([matmul(grad.t(), part) for grad, part in parts])


def describe(device: torch.device) -> str:
    return "grouped matmul" if device.type == "cuda" else "one matmul an expert"
