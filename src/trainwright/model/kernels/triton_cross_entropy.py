"""Loss and gradient of a chunk of logits in two readings and one writing. What it must match is `cross_entropy.py`.

As separate operations (log softmax, exponential, one-hot, cast) the same is five passes, and tensors one and a half
times as large as the logits live beside them. The running maximum is online softmax's (Milakov & Gimelshein 2018).
Rows may stand further apart than they are long; the gradient's then do too.
"""

# Kernels are written without type annotations: Triton reads its own from them.
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _top_and_total(logits, columns: tl.constexpr, LEAST: tl.constexpr, WIDTH: tl.constexpr):
    """The highest of a row, and the sum of the exponentials of all differences from it."""
    column = tl.arange(0, WIDTH)
    highest = tl.full([WIDTH], LEAST, dtype=tl.float32)
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for begin in range(0, columns, WIDTH):
        x = tl.load(logits + begin + column, mask=begin + column < columns, other=LEAST)
        now = tl.maximum(highest, x)
        total = total * tl.exp(highest - now) + tl.exp(x - now)
        highest = now
    top = tl.max(highest, 0)
    return top, tl.sum(total * tl.exp(highest - top), 0)


@triton.jit
def _softmax_kernel(
    logits, labels, grad, loss, columns: tl.constexpr, apart: tl.constexpr, LEAST: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * apart
    grad += row * apart
    column = tl.arange(0, WIDTH)
    if label < 0:
        tl.store(loss + row, 0.0)
        for begin in range(0, columns, WIDTH):
            nothing = tl.zeros([WIDTH], dtype=tl.float32).to(grad.dtype.element_ty)
            tl.store(grad + begin + column, nothing, mask=begin + column < columns)
    else:
        top, total = _top_and_total(logits, columns, LEAST, WIDTH)
        whole = top + tl.log(total)
        tl.store(loss + row, whole - tl.load(logits + label))
        for begin in range(0, columns, WIDTH):
            inside = begin + column < columns
            x = tl.load(logits + begin + column, mask=inside, other=LEAST)
            p = tl.exp(x - whole)
            p = tl.where(begin + column == label, p - 1.0, p)
            tl.store(grad + begin + column, p.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _sums_kernel(
    logits, labels, sums, rows, columns: tl.constexpr, apart: tl.constexpr, LEAST: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * apart
    top, total = _top_and_total(logits, columns, LEAST, WIDTH)
    tl.store(sums + row, top)
    tl.store(sums + rows + row, total)
    tl.store(sums + 2 * rows + row, tl.load(logits + label, mask=label >= 0, other=0.0))


@triton.jit
def _gradient_kernel(
    logits, labels, whole, grad, columns: tl.constexpr, apart: tl.constexpr, LEAST: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    x = tl.load(logits + row * apart + column, mask=inside, other=LEAST)
    p = tl.exp(x - tl.load(whole + row))
    p = tl.where(column == tl.load(labels + row), p - 1.0, p)
    tl.store(grad + row * apart + column, p.to(grad.dtype.element_ty), mask=inside)


def slice_sums(logits_MV: Tensor, labels_M: Tensor) -> Tensor:
    """[3, M] float32 of a slice of the vocabulary: the highest logit, the sum of exponentials of their differences from
    it, and the label's logit, 0 where the label (below 0) is in another slice."""
    rows, columns = logits_MV.shape
    sums_3M = torch.empty(3, rows, device=logits_MV.device)
    apart = logits_MV.stride(0)
    _sums_kernel[(rows,)](logits_MV, labels_M, sums_3M, rows, columns, apart, LEAST=-1e30, WIDTH=4096, num_warps=8)
    return sums_3M


def slice_gradient(logits_MV: Tensor, labels_M: Tensor, whole_M: Tensor, dtype: torch.dtype) -> Tensor:
    """[M, V]: softmax - one-hot of a slice, where `whole_M` is the log of the sum of all slices' exponentials."""
    rows, columns = logits_MV.shape
    grad_MV = logits_MV.new_empty(rows, logits_MV.stride(0), dtype=dtype)[:, :columns]  # room behind the last row too
    grid, apart = (rows, triton.cdiv(columns, 4096)), logits_MV.stride(0)
    _gradient_kernel[grid](logits_MV, labels_M, whole_M, grad_MV, columns, apart, LEAST=-1e30, WIDTH=4096, num_warps=8)
    return grad_MV


def softmax_gradient(logits_MV: Tensor, labels_M: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(softmax - one-hot of the label in `dtype` [M, V], -log softmax[label] float32 [M]) of float32 logits.

    Rows whose label is below 0 are not trained: zeros in both.
    """
    rows, columns = logits_MV.shape
    grad_MV = logits_MV.new_empty(rows, logits_MV.stride(0), dtype=dtype)[:, :columns]  # room behind the last row too
    loss_M, apart = torch.empty(rows, device=logits_MV.device), logits_MV.stride(0)
    # A number below every logit, and finite: the difference of two infinities is none.
    _softmax_kernel[(rows,)](logits_MV, labels_M, grad_MV, loss_M, columns, apart, LEAST=-1e30, WIDTH=4096, num_warps=8)
    return grad_MV, loss_M
