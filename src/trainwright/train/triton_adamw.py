"""AdamW's update as one kernel for all parameters: every number is read once and written once.

torch's fused kernel writes the gradients back, divided by their scale, and reaches two thirds of an H200's memory rate.
The arithmetic that it must match is `torch.optim.AdamW`'s.
"""

# Kernels are written without type annotations: Triton reads its own from them.
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainwright.train.triton_tables import TYPES, address, addresses, numbers, owners

NUMBERS, WARPS = 1024, 4
"""That one program takes."""
Item = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Weight, gradient, both moments, count of steps."""


@triton.jit
def _adamw_kernel(
    addresses, sizes, items, begins, grad_scale, found_inf, rate, beta1, beta2, eps, decay, count_of_tensors,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, SCALED: tl.constexpr, GUARDED: tl.constexpr,
    ALIGNED: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    at = tl.load(items + tl.program_id(0)).to(tl.int32)
    row = addresses + at
    weight = address(row, 0, count_of_tensors, WEIGHT, ALIGNED)
    grad = address(row, 1, count_of_tensors, GRAD, ALIGNED)
    first = address(row, 2, count_of_tensors, MOMENT, ALIGNED)
    second = address(row, 3, count_of_tensors, MOMENT, ALIGNED)
    count = tl.load(address(row, 4, count_of_tensors, tl.float32, False))
    size = tl.load(sizes + at)
    if GUARDED:  # a refused step has no numbers
        size = tl.where(tl.load(found_inf) > 0.5, 0, size)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    place = (tl.program_id(0) - tl.load(begins + at)).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    inside = place < size

    wide = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        wide *= 1 / tl.load(grad_scale)
    mean = tl.load(first + place, mask=inside, other=0.0).to(tl.float32)
    mean += (wide - mean) * (1 - beta1)
    square = tl.load(second + place, mask=inside, other=0.0).to(tl.float32)
    square = square * beta2 + wide * wide * (1 - beta2)
    correction1, correction2 = 1 - tl.exp2(count * tl.log2(beta1)), 1 - tl.exp2(count * tl.log2(beta2))
    old = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    new = old * (1 - rate * decay) - (rate / correction1) * mean / (tl.sqrt(square * (1 / correction2)) + eps)
    tl.store(weight + place, new.to(WEIGHT), mask=inside)
    tl.store(first + place, mean.to(MOMENT), mask=inside)
    tl.store(second + place, square.to(MOMENT), mask=inside)


def update(
    items: Sequence[Item], settings: tuple[float, ...], grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """In place, of contiguous tensors on one device. settings: rate, both betas, eps, weight decay."""
    kinds: dict[tuple[torch.dtype, ...], list[Item]] = {}
    for item in items:
        kinds.setdefault((item[0].dtype, item[1].dtype, item[2].dtype), []).append(item)
    for (weight, grad, moment), group in kinds.items():
        device = group[0][0].device
        sizes = tuple(item[0].numel() for item in group)
        which, begins = owners(tuple(-(-size // NUMBERS) for size in sizes), device)
        table, aligned = addresses(group, device)
        anything = group[0][4]  # where there is nothing to read
        _adamw_kernel[(len(which),)](
            table, numbers(sizes, device), which, begins,
            anything if grad_scale is None else grad_scale, anything if found_inf is None else found_inf,
            *settings, len(group), WEIGHT=TYPES[weight], GRAD=TYPES[grad], MOMENT=TYPES[moment],
            SCALED=grad_scale is not None, GUARDED=found_inf is not None,
            ALIGNED=aligned and all(size % 16 == 0 for size in sizes), NUMBERS=NUMBERS, num_warps=WARPS,
        )  # fmt: skip
