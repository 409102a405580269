"""Numbers of one type in another, scaled or not, in whole reads and writes. What it must match is `cast.py`."""

# Kernels are written without type annotations: Triton reads its own from them.
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _cast_kernel(x, factor, out, count, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    number = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        number *= tl.load(factor)
    tl.store(out + place, number.to(out.dtype.element_ty), mask=inside)


def cast(x: Tensor, dtype: torch.dtype, factor: Tensor | None = None) -> Tensor:
    """A contiguous tensor, times factor [] (float32) where there is one, in `dtype`."""
    out, count = torch.empty_like(x, dtype=dtype), x.numel()
    given, programs = x if factor is None else factor, (-(-count // BLOCK),)
    _cast_kernel[programs](x, given, out, count, SCALED=factor is not None, BLOCK=BLOCK, num_warps=4)
    return out
