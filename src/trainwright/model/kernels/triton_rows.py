"""Sums over rows that stand at given places, and the gradients of such a sum, each row read once and written once.

What they must match is `rows.py`, whose names they use: choices whose place is `count` or more have no row. Every row
belongs to one choice, so nothing is added in memory.
"""

# Kernels are written without type annotations: Triton reads its own from them.
import triton
import triton.language as tl
from torch import Tensor

# How many rows there are differs in each step: no kernel of its own for numbers that 16 divides.


@triton.jit(do_not_specialize=["count"])
def _sums_kernel(
    rows, weights, places, out, count, width: tl.constexpr, CHOICES: tl.constexpr, WEIGHTED: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for choice in tl.static_range(CHOICES):  # unrolled, so that all of them are on their way at once
        place = tl.load(places + token * CHOICES + choice)
        x = tl.load(rows + place * width + column, mask=inside & (place < count), other=0.0).to(tl.float32)
        if WEIGHTED:
            x *= tl.load(weights + token * CHOICES + choice).to(tl.float32)
        total += x
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _mix_gradients_kernel(
    grad, rows, weights, places, of_rows, of_weights, count, width: tl.constexpr, CHOICES: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, TILE)
    number = token * CHOICES + choice
    place = tl.load(places + number, mask=choice < CHOICES, other=0)
    there = (choice < CHOICES) & (place < count)
    weight = tl.load(weights + number, mask=there, other=0.0).to(tl.float32)
    column = tl.arange(0, WIDTH)
    products = tl.zeros([TILE, WIDTH], dtype=tl.float32)
    for begin in range(0, width, WIDTH):
        inside = begin + column < width
        upper = tl.load(grad + token * width + begin + column, mask=inside, other=0.0).to(tl.float32)
        at = place[:, None] * width + (begin + column)[None, :]
        real = there[:, None] & inside[None, :]
        products += tl.load(rows + at, mask=real, other=0.0).to(tl.float32) * upper[None, :]
        tl.store(of_rows + at, (weight[:, None] * upper[None, :]).to(of_rows.dtype.element_ty), mask=real)
    total = tl.sum(products, 1)
    tl.store(of_weights + number, total.to(of_weights.dtype.element_ty), mask=choice < CHOICES)


def sums(x_RH: Tensor, weights_MC: Tensor | None, places_MC: Tensor) -> Tensor:
    """[M, H]: the sum of each token's rows, by `weights` where there are any, in float32 until it is whole."""
    (tokens, choices), (count, width) = places_MC.shape, x_RH.shape
    out_MH = x_RH.new_empty(tokens, width)
    if out_MH.numel():
        wide = min(1024, triton.next_power_of_2(width))  # 16 bytes a thread of 16-bit rows
        weights = x_RH if weights_MC is None else weights_MC.contiguous()  # any pointer, where it is not read
        grid = (tokens, triton.cdiv(width, wide))
        _sums_kernel[grid](
            x_RH.contiguous(), weights, places_MC.contiguous(), out_MH, count, width, choices, weights_MC is not None,
            wide, num_warps=4,
        )  # fmt: skip
    return out_MH


def mix_gradients(grad_MH: Tensor, x_RH: Tensor, weights_MC: Tensor, places_MC: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of the rows: each token's by its weight, of the weights: each row times its token's gradient)."""
    (tokens, choices), (count, width) = places_MC.shape, x_RH.shape
    of_rows, of_weights = x_RH.new_empty(x_RH.shape), weights_MC.new_empty(weights_MC.shape)
    if tokens:
        tile = triton.next_power_of_2(choices)
        wide = min(max(16, 4096 // tile), triton.next_power_of_2(width))
        _mix_gradients_kernel[(tokens,)](
            grad_MH.contiguous(), x_RH.contiguous(), weights_MC.contiguous(), places_MC.contiguous(), of_rows,
            of_weights, count, width, choices, tile, wide, num_warps=4,
        )  # fmt: skip
    return of_rows, of_weights
