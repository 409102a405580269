"""16 bits to float32 in whole reads and writes."""

# Kernels are written without type annotations: Triton reads its own from them.
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _widen_kernel(narrow, wide, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    tl.store(wide + place, tl.load(narrow + place, mask=inside, other=0.0).to(tl.float32), mask=inside)


def widen(narrow: Tensor) -> Tensor:
    """A contiguous tensor in float32."""
    wide, count = torch.empty_like(narrow, dtype=torch.float32), narrow.numel()
    _widen_kernel[(-(-count // BLOCK),)](narrow, wide, count, BLOCK=BLOCK, num_warps=4)
    return wide
