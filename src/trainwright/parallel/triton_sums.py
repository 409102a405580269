"""Sums of gradients in float32, each in one pass over the memory: one more micro batch's, and all ranks' parts.

What they must match is `total += grad`, and the sum of the parts in the order of the ranks.
"""

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


@triton.jit
def _parts_kernel(own, others, total, count, RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    first = own if RANK == 0 else others
    found = tl.load(first + place, mask=inside, other=0.0).to(tl.float32)
    for rank in tl.static_range(1, RANKS):
        if rank == RANK:
            part = tl.load(own + place, mask=inside, other=0.0)
        else:
            row = tl.full([], rank - 1 if rank > RANK else rank, tl.int64) * count
            part = tl.load(others + row + place, mask=inside, other=0.0)
        found += part.to(tl.float32)
    tl.store(total + place, found, mask=inside)


def add(total: Tensor, grad: Tensor) -> None:
    """total (float32) += grad, in place; both contiguous, of one shape."""
    count = total.numel()
    _add_kernel[(-(-count // BLOCK),)](total, grad, count, BLOCK=BLOCK, num_warps=4)


def sum_parts(own: Tensor, others: Tensor, rank: int, total: Tensor) -> None:
    """total [N] (float32) = the sum of own [N], which is rank `rank`'s, and others [R - 1, N], the other ranks' in
    their order; all contiguous."""
    count, ranks = total.numel(), len(others) + 1
    programs = (-(-count // BLOCK),)
    _parts_kernel[programs](own, others, total, count, RANK=rank, RANKS=ranks, BLOCK=BLOCK, num_warps=4)
