"""A gradient added to a float32 sum in one pass. What it must match is `total += grad`."""

# Kernels are written without type annotations: Triton reads its own from them.
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _add_kernel(total, grad, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    before = tl.load(total + place, mask=inside, other=0.0)
    more = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + place, before + more, mask=inside)


def add(total: Tensor, grad: Tensor) -> None:
    """total (float32) += grad, in place; both contiguous, of one shape."""
    count = total.numel()
    _add_kernel[(-(-count // BLOCK),)](total, grad, count, BLOCK=BLOCK, num_warps=4)
