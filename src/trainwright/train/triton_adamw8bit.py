"""AdamW with 8-bit moments: one kernel for all parameters. The arithmetic it must match is `_update_plain`'s."""

# Kernels are written without type annotations: Triton reads its own from them.
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainwright.train.adamw8bit import BLOCK
from trainwright.train.triton_tables import TYPES, addresses, numbers, owners

NUMBERS = 4096
"""That one program takes."""
Item = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Weight, gradient, states."""
MOMENTS = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")


# Codes and back by arithmetic. Looked up, in two searches of 8 levels and two tables, they take eight times as long as
# the memory does. What counts is how far a code is from that of zero: 1 + decade + place within the decade, as the n
# places of a decade begin at n, a power of two. So a code's number as a float has both: the decade is the exponent.


@triton.jit
def _power(exponent):
    """10 to a whole number from 0 to 7."""
    odd = tl.where((exponent & 1) != 0, 10.0, 1.0)
    return odd * tl.where((exponent & 2) != 0, 1e2, 1.0) * tl.where((exponent & 4) != 0, 1e4, 1.0)


@triton.jit
def _value(code, SIGNED: tl.constexpr):
    """`adamw8bit.code`'s number of a code."""
    number = tl.abs(code - 127) if SIGNED else code + 1  # the n places of a decade are n to 2n - 1
    bits = number.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    begin = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # 1 + place / n
    half = ((126 - exponent) << 23).to(tl.float32, bitcast=True)  # 0.5 / n
    decade = exponent if SIGNED else exponent - 1
    value = (0.9 * (begin + half) - 0.8) * (_power(decade) * 1e-6)
    value = tl.where(decade == 7, 1.0, tl.where(number == (0 if SIGNED else 1), 0.0, value))
    return tl.where(code < 127, -value, value) if SIGNED else value


@triton.jit
def _code(share, SIGNED: tl.constexpr):
    """The code whose number is nearest to a share of the largest, -1 to 1."""
    size = tl.abs(share)
    decade = tl.zeros_like(share).to(tl.int32)
    for below in tl.static_range(6):  # borders: between a decade's last number and the first of the next
        decade += (size > 10.0 ** (below - 6) * (1 + 0.9 / 2 ** (below if SIGNED else below + 1))).to(tl.int32)
    exponent = decade if SIGNED else decade + 1
    count = 1 << exponent
    place = (size * _power(6 - decade) - 0.1) * (count.to(tl.float32) * (1 / 0.9))
    number = count + tl.minimum(tl.maximum(place, 0.0).to(tl.int32), count - 1)
    number = tl.where(size > 1 - 0.225 / (64 if SIGNED else 128), 128 if SIGNED else 256, number)
    number = tl.where(size > (0.275e-6 if SIGNED else 0.1625e-6), number, 0 if SIGNED else 1)
    if SIGNED:  # 1 is a number, -1 is none
        return tl.where(share < 0, 127 - tl.minimum(number, 127), 127 + number)
    return number - 1


@triton.jit
def _compress(values, codes, scales, place, block, inside, real, SIGNED: tl.constexpr):
    scale = tl.max(tl.abs(values), 1)
    share = values * (1 / tl.maximum(scale, 1e-37))[:, None]
    tl.store(codes + place, _code(share, SIGNED).to(tl.uint8), mask=inside)
    tl.store(scales + block, scale, mask=real)


@triton.jit
def _adamw_kernel(
    addresses, shapes, items, begins, grad_scale, found_inf,
    rate, beta1, beta2, eps, decay, count_of_tensors,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr,
    SCALED: tl.constexpr, GUARDED: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Each program takes `BLOCKS` blocks of `SIZE` columns of one parameter; the last of a row may be shorter."""
    at = tl.load(items + tl.program_id(0)).to(tl.int32)
    row = addresses + at
    weight = tl.load(row).to(tl.pointer_type(WEIGHT))
    grad = tl.load(row + count_of_tensors).to(tl.pointer_type(GRAD))
    first_codes = tl.load(row + 2 * count_of_tensors).to(tl.pointer_type(tl.uint8))
    first_scales = tl.load(row + 3 * count_of_tensors).to(tl.pointer_type(tl.float32))
    second_codes = tl.load(row + 4 * count_of_tensors).to(tl.pointer_type(tl.uint8))
    second_scales = tl.load(row + 5 * count_of_tensors).to(tl.pointer_type(tl.float32))
    step = tl.load(row + 6 * count_of_tensors).to(tl.pointer_type(tl.float32))
    rows, columns, begin = tl.load(shapes + 2 * at), tl.load(shapes + 2 * at + 1), tl.load(begins + at)

    per_row = tl.cdiv(columns, SIZE)
    block = (tl.program_id(0) - begin).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    count_of_blocks = rows * per_row
    if GUARDED:  # a refused step has no blocks
        count_of_blocks = tl.where(tl.load(found_inf) > 0.5, 0, count_of_blocks)
    real = block < count_of_blocks
    column = ((block % per_row) * SIZE)[:, None] + tl.arange(0, SIZE)[None, :]
    place = (block // per_row * columns)[:, None] + column
    inside = real[:, None] & (column < columns)

    wide = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        wide /= tl.load(grad_scale)
    first = _value(tl.load(first_codes + place, mask=inside, other=0).to(tl.int32), True)
    first *= tl.load(first_scales + block, mask=real, other=0.0)[:, None]
    second = _value(tl.load(second_codes + place, mask=inside, other=0).to(tl.int32), False)
    second *= tl.load(second_scales + block, mask=real, other=0.0)[:, None]
    first = tl.where(inside, first * beta1 + wide * (1 - beta1), 0.0)
    second = tl.where(inside, second * beta2 + wide * wide * (1 - beta2), 0.0)

    count = tl.load(step)
    correction1, correction2 = 1 - tl.exp2(count * tl.log2(beta1)), 1 - tl.exp2(count * tl.log2(beta2))
    denominator = tl.sqrt(second / correction2) + eps
    old = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    new = old * (1 - rate * decay) - rate / correction1 * first / denominator
    tl.store(weight + place, new.to(WEIGHT), mask=inside)
    _compress(first, first_codes, first_scales, place, block, inside, real, True)
    _compress(second, second_codes, second_scales, place, block, inside, real, False)


def update(
    items: Sequence[Item], settings: tuple[float, ...], grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """`adamw8bit._update_plain` for parameters with 8-bit moments, in place. All on one device."""
    kinds: dict[tuple[torch.dtype, torch.dtype, int], list[Item]] = {}
    for weight, grad, state in items:
        # Rows shorter than a block (an adapter's B) are blocks of their own length: no lanes without work.
        size = min(BLOCK, max(16, triton.next_power_of_2(weight.shape[-1])))
        kinds.setdefault((weight.dtype, grad.dtype, size), []).append((weight, grad.contiguous(), state))
    for (weights, grads, size), group in kinds.items():
        device = group[0][0].device
        shapes = [(weight.numel() // weight.shape[-1], weight.shape[-1]) for weight, _, _ in group]
        blocks = [rows * triton.cdiv(columns, size) for rows, columns in shapes]
        which, begins = owners(tuple(triton.cdiv(count * size, NUMBERS) for count in blocks), device)
        tensors = [(w, g, *(state[key] for key in MOMENTS), state["step"]) for w, g, state in group]
        anything = group[0][2]["step"]  # where there is nothing to read
        _adamw_kernel[(len(which),)](
            addresses(tensors, device), numbers(tuple(n for shape in shapes for n in shape), device), which, begins,
            anything if grad_scale is None else grad_scale, anything if found_inf is None else found_inf,
            *settings, len(group), WEIGHT=TYPES[weights], GRAD=TYPES[grads], SCALED=grad_scale is not None,
            GUARDED=found_inf is not None, SIZE=size, BLOCKS=NUMBERS // size, num_warps=8,
        )  # fmt: skip
