"""AdamW with 8-bit moments: one kernel for all parameters. The arithmetic it must match is `_update_plain`'s."""

# Kernels are written without type annotations: Triton reads its own from them.
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainwright.train.adamw8bit import BLOCK
from trainwright.train.triton_tables import TYPES, address, addresses, numbers, owners

TILES, WARPS = 4, 4
"""Of one program, which takes 4 float32 or 8 narrower numbers a thread at a time: whole reads."""
Item = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Weight, gradient, states."""
MOMENTS = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")


# Codes and back by arithmetic: a search among 255 borders is 8 dependent lookups, and lookups want a layout of their
# own. How far a code is from that of zero, its rank, is n + place: a decade has n places, a power of two, so a rank's
# exponent is the decade and its fraction the place. Numbers just above a power of ten are still nearest to the last of
# the decade below, rank n - 1.
_MAGIC = tl.constexpr(12582912.0)  # 1.5 x 2^23: added to a float, it leaves the nearest whole number in the last bits
_BITS = tl.constexpr(0x4B400000)  # of that


@triton.jit
def _value(code, SIGNED: tl.constexpr):
    """`adamw8bit.code`'s number of a code."""
    rank = tl.abs(code - 127) if SIGNED else code + 1
    bits = ((rank + _BITS).to(tl.float32, bitcast=True) - _MAGIC).to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) + (_BITS - 127)).to(tl.float32, bitcast=True) - _MAGIC
    decade = tl.exp2(exponent * 3.3219281 - (19.931569 if SIGNED else 23.253497))
    begin = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # 1 + place / n
    half = (0x7E800000 - (bits & 0x7F800000)).to(tl.float32, bitcast=True)  # 0.5 / n
    value = ((begin + half) * 0.9 - 0.8) * decade
    value = tl.where(code == 255, 1.0, tl.where(rank == (0 if SIGNED else 1), 0.0, value))
    return tl.where(code < 127, -value, value) if SIGNED else value


@triton.jit
def _code(share, SIGNED: tl.constexpr):
    """The code whose number is nearest to a share of the largest, -1 to 1."""
    MORE: tl.constexpr = 0 if SIGNED else 1
    size = tl.abs(share)
    # The decade, 0 to 6, by a logarithm that is up to 0.09 too small (the fraction of the bits); what then lies above
    # its decade belongs to the next one.
    logarithm = size.to(tl.int32, bitcast=True).to(tl.float32) * (0.30103 / 8388608) + (6.5 - 127 * 0.30103)
    whole = tl.maximum(logarithm + _MAGIC, _MAGIC)
    decade = whole.to(tl.int32, bitcast=True) - _BITS
    count = ((decade + (127 + MORE)) << 23).to(tl.float32, bitcast=True)
    tenths = size * tl.exp2((whole - _MAGIC) * -3.3219281 + 19.931569)  # of the decade, 0.1 to 1
    place = (tenths - 0.1) * (count * 1.1111111)
    beyond = place - count  # below 0, the next decade's first number is at 2
    beyond = tl.where(beyond > 1, beyond * 0.2 - 0.5, tl.minimum(beyond - 0.5, -1.0))
    below = tl.where(decade > 0, 0.2, 0.1944444 if SIGNED else 0.1388889)
    beyond = tl.where(place < below, -1 - count, beyond)
    rank = ((beyond + _MAGIC) + count * 2).to(tl.int32, bitcast=True) - _BITS
    if SIGNED:  # 1 is a number, -1 is none
        rank = tl.where(share > 1 - 0.225 / 64, 128, tl.minimum(rank, 127))
        return 127 + tl.where(share < 0, -rank, rank)
    return tl.where(share > 1 - 0.225 / 128, 256, tl.minimum(rank, 255)) - 1


@triton.jit
def _compress(values, codes, scales, place, block, inside, real, SIGNED: tl.constexpr):
    scale = tl.max(tl.abs(values), 1)
    share = values * (1 / tl.maximum(scale, 1e-37))[:, None]
    tl.store(codes + place, _code(share, SIGNED).to(tl.uint8), mask=inside)
    tl.store(scales + block, scale, mask=real)


@triton.jit
def _adamw_kernel(
    addresses, shapes, items, begins, grad_scale, found_inf, rate, beta1, beta2, eps, decay, count_of_tensors,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, SCALED: tl.constexpr, GUARDED: tl.constexpr, WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Each program takes `TILES` times `BLOCKS` blocks of `SIZE` columns of one parameter.

    WHOLE: no block at the end of a row is shorter. ALIGNED: all tensors begin at whole reads.
    """
    at = tl.load(items + tl.program_id(0)).to(tl.int32)
    row = addresses + at
    weight = address(row, 0, count_of_tensors, WEIGHT, ALIGNED)
    grad = address(row, 1, count_of_tensors, GRAD, ALIGNED)
    first_codes = address(row, 2, count_of_tensors, tl.uint8, ALIGNED)
    first_scales = address(row, 3, count_of_tensors, tl.float32, False)
    second_codes = address(row, 4, count_of_tensors, tl.uint8, ALIGNED)
    second_scales = address(row, 5, count_of_tensors, tl.float32, False)
    count = tl.load(address(row, 6, count_of_tensors, tl.float32, False))
    rows, columns = tl.load(shapes + 2 * at), tl.load(shapes + 2 * at + 1)
    per_row = tl.cdiv(columns, SIZE).to(tl.int32)
    count_of_blocks = (rows * per_row).to(tl.int32)
    if GUARDED:  # a refused step has no blocks
        count_of_blocks = tl.where(tl.load(found_inf) > 0.5, 0, count_of_blocks)
    over = 1.0
    if SCALED:
        over = 1 / tl.load(grad_scale)
    correction1, correction2 = 1 - tl.exp2(count * tl.log2(beta1)), 1 - tl.exp2(count * tl.log2(beta2))
    pace, over2, kept = rate / correction1, 1 / correction2, 1 - rate * decay

    for tile in range(TILES):
        block = ((tl.program_id(0) - tl.load(begins + at)) * TILES + tile) * BLOCKS + tl.arange(0, BLOCKS)
        real = block < count_of_blocks
        lane = tl.arange(0, SIZE)[None, :]
        if WHOLE:
            place = block.to(tl.int64)[:, None] * SIZE + lane
            inside = real[:, None] & (lane >= 0)
        else:
            column = ((block % per_row) * SIZE)[:, None] + lane
            place = ((block // per_row).to(tl.int64) * columns)[:, None] + column
            inside = real[:, None] & (column < columns)

        wide = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * over
        first = _value(tl.load(first_codes + place, mask=inside, other=0).to(tl.int32), True)
        first *= tl.load(first_scales + block, mask=real, other=0.0)[:, None]
        second = _value(tl.load(second_codes + place, mask=inside, other=0).to(tl.int32), False)
        second *= tl.load(second_scales + block, mask=real, other=0.0)[:, None]
        first = first * beta1 + wide * (1 - beta1)
        second = second * beta2 + wide * wide * (1 - beta2)
        if not WHOLE:
            first, second = tl.where(inside, first, 0.0), tl.where(inside, second, 0.0)
        old = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
        new = old * kept - pace * first / (tl.sqrt(second * over2) + eps)
        tl.store(weight + place, new.to(WEIGHT), mask=inside)
        _compress(first, first_codes, first_scales, place, block, inside, real, True)
        _compress(second, second_codes, second_scales, place, block, inside, real, False)


def update(
    items: Sequence[Item], settings: tuple[float, ...], grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """`adamw8bit._update_plain` for parameters with 8-bit moments, in place. All on one device."""
    kinds: dict[tuple[Any, ...], list[Item]] = {}
    for weight, grad, state in items:
        # Rows shorter than a block (an adapter's B) are blocks of their own length: no lanes without work.
        columns = weight.shape[-1]
        size = min(BLOCK, max(16, 1 << (columns - 1).bit_length()))
        kinds.setdefault((weight.dtype, grad.dtype, size, columns % size == 0), []).append(
            (weight, grad.contiguous(), state)
        )
    for (weights, grads, size, whole), group in kinds.items():
        device = group[0][0].device
        shapes = [(weight.numel() // weight.shape[-1], weight.shape[-1]) for weight, _, _ in group]
        blocks = [rows * -(-columns // size) for rows, columns in shapes]
        at_once = max(1, 32 * WARPS * (4 if torch.float32 in (weights, grads) else 8) // size)
        which, begins = owners(tuple(-(-count // (at_once * TILES)) for count in blocks), device)
        tensors = [(w, g, *(state[key] for key in MOMENTS), state["step"]) for w, g, state in group]
        table, aligned = addresses(tensors, device)
        anything = group[0][2]["step"]  # where there is nothing to read
        _adamw_kernel[(len(which),)](
            table, numbers(tuple(n for shape in shapes for n in shape), device), which, begins,
            anything if grad_scale is None else grad_scale, anything if found_inf is None else found_inf,
            *settings, len(group), WEIGHT=TYPES[weights], GRAD=TYPES[grads],
            SCALED=grad_scale is not None, GUARDED=found_inf is not None, WHOLE=whole, ALIGNED=aligned and whole,
            SIZE=size, BLOCKS=at_once, TILES=TILES, num_warps=WARPS,
        )  # fmt: skip
