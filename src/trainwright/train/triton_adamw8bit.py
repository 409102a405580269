"""AdamW with 8-bit moments in one pass over a parameter. The arithmetic it must match is `adamw8bit._update_plain`."""

# Kernels are written without type annotations: Triton reads its own from them.
import triton
import triton.language as tl
from torch import Tensor

from trainwright.train.adamw8bit import BLOCK, borders, code


@triton.jit
def _nearest(share, edges):
    """Index of the nearest value: how many of the 255 borders lie below."""
    index = tl.zeros_like(share).to(tl.int32)
    for power in tl.static_range(8):
        further = index + (128 >> power)
        index = tl.where(share > tl.load(edges + further - 1), further, index)
    return index


@triton.jit
def _compress(values, codes, scales, place, block, inside, real, edges):
    scale = tl.max(tl.abs(values), 1)
    share = values / tl.maximum(scale, 1e-37)[:, None]
    tl.store(codes + place, _nearest(share, edges).to(tl.uint8), mask=inside)
    tl.store(scales + block, scale, mask=real)


@triton.jit
def _adamw_kernel(
    weight, grad, first_codes, first_scales, second_codes, second_scales, step, grad_scale, found_inf,
    signed, signed_edges, unsigned, unsigned_edges,
    rate, beta1, beta2, eps, decay, rows, columns,
    SCALED: tl.constexpr, GUARDED: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Each program takes some blocks of `SIZE` columns; the last block of a row may be shorter."""
    per_row = tl.cdiv(columns, SIZE)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
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
    first = tl.load(signed + tl.load(first_codes + place, mask=inside, other=0).to(tl.int32))
    first *= tl.load(first_scales + block, mask=real, other=0.0)[:, None]
    second = tl.load(unsigned + tl.load(second_codes + place, mask=inside, other=0).to(tl.int32))
    second *= tl.load(second_scales + block, mask=real, other=0.0)[:, None]
    first = tl.where(inside, first * beta1 + wide * (1 - beta1), 0.0)
    second = tl.where(inside, second * beta2 + wide * wide * (1 - beta2), 0.0)

    count = tl.load(step)
    correction1, correction2 = 1 - tl.exp2(count * tl.log2(beta1)), 1 - tl.exp2(count * tl.log2(beta2))
    denominator = tl.sqrt(second / correction2) + eps
    old = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    new = old * (1 - rate * decay) - rate / correction1 * first / denominator
    tl.store(weight + place, new.to(weight.dtype.element_ty), mask=inside)
    _compress(first, first_codes, first_scales, place, block, inside, real, signed_edges)
    _compress(second, second_codes, second_scales, place, block, inside, real, unsigned_edges)


def update(
    weight: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    settings: tuple[float, ...],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """`adamw8bit._update_plain` for a parameter with 8-bit moments, in place."""
    columns = weight.shape[-1]
    rows = weight.numel() // columns
    blocks = rows * triton.cdiv(columns, BLOCK)
    lookups = [table(signed, weight.device) for signed in (True, False) for table in (code, borders)]
    moments = [state[key] for key in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")]
    _adamw_kernel[(triton.cdiv(blocks, 8),)](
        weight, grad.contiguous(), *moments, state["step"],
        state["step"] if grad_scale is None else grad_scale, state["step"] if found_inf is None else found_inf,
        *lookups, *settings, rows, columns,
        SCALED=grad_scale is not None, GUARDED=found_inf is not None, SIZE=BLOCK, BLOCKS=8, num_warps=4,
    )  # fmt: skip
