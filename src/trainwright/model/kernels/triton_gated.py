"""The gated SiLU and its gradients, each in one pass. What they must match is `gated.py`."""

# Kernels are written without type annotations: Triton reads its own from them.
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _product_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (x * tl.sigmoid(x) * y).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradients_kernel(grad, gate, up, of_gate, of_up, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    above = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(x)
    tl.store(of_up + place, (above * x * share).to(of_up.dtype.element_ty), mask=inside)
    slope = share * (1 + x * (1 - share))
    tl.store(of_gate + place, (above * y * slope).to(of_gate.dtype.element_ty), mask=inside)


def product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of contiguous tensors of one shape."""
    out = torch.empty_like(gate)
    _product_kernel[(-(-out.numel() // BLOCK),)](gate, up, out, out.numel(), BLOCK=BLOCK, num_warps=4)
    return out


def gradients(grad: Tensor, gate: Tensor, up: Tensor, *, over: bool = False) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, all contiguous, of one shape. over: gate's takes the place of `grad`."""
    of_gate, of_up = grad if over else torch.empty_like(gate), torch.empty_like(up)
    programs = (-(-grad.numel() // BLOCK),)
    _gradients_kernel[programs](grad, gate, up, of_gate, of_up, grad.numel(), BLOCK=BLOCK, num_warps=4)
    return of_gate, of_up
