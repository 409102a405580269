"""The gradient of a table whose rows were looked up: each row summed in float32 by one program, and rounded once.

Nothing is added in memory, so the same ids give the same bits, and nothing is made beside the gradient but the ids in
their order. What it must match is the gradient of `F.embedding`.
"""

# Kernels are written without type annotations: Triton reads its own from them.
import triton
import triton.language as tl
from torch import Tensor

# How many tokens there are differs between batches: no kernel of its own for numbers that 16 divides.


@triton.jit(do_not_specialize=["count", "padding_idx"])
def _gradient_kernel(
    ids, order, grad, out, count, padding_idx, width: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """One program for each place in the order and some columns; the first of equal ids takes all of them."""
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    id_ = tl.load(ids + place)
    if place > 0:
        before = tl.load(ids + place - 1)
    else:
        before = id_ - 1
    if (id_ != before) & (id_ != padding_idx):
        total = tl.zeros([WIDTH], dtype=tl.float32)
        more = place
        while more < count:  # a run of pads may be long: some rows at a time
            at = more + tl.arange(0, ROWS)
            same = (at < count) & (tl.load(ids + at, mask=at < count, other=-1) == id_)
            token = tl.load(order + at, mask=same, other=0)
            there = same[:, None] & (column < width)[None, :]
            total += tl.sum(
                tl.load(grad + token[:, None] * width + column[None, :], mask=there, other=0.0).to(tl.float32), 0
            )
            more = tl.where(tl.sum(same.to(tl.int32), 0) == ROWS, more + ROWS, count.to(tl.int64))
        tl.store(out + id_ * width + column, total.to(out.dtype.element_ty), mask=column < width)


def table_gradient(grad_MH: Tensor, ids_M: Tensor, rows: int, padding_idx: int | None = None) -> Tensor:
    """[rows, H] in the gradient's dtype: each row's sum over the tokens of its id, 0 for those of none and of padding.

    ids: 0 to `rows` - 1.
    """
    count, width = grad_MH.shape
    out_VH = grad_MH.new_zeros(rows, width)
    if grad_MH.numel():
        # 64-bit: a row's number times its width is too. Stable: the order of a sum is the order of its tokens.
        sorted_M, order_M = ids_M.long().sort(stable=True)
        wide = min(512, triton.next_power_of_2(width))
        _gradient_kernel[(count, triton.cdiv(width, wide))](
            sorted_M, order_M, grad_MH.contiguous(), out_VH, count, -1 if padding_idx is None else padding_idx, width,
            ROWS=8, WIDTH=wide, num_warps=4,
        )  # fmt: skip
    return out_VH
