"""Triton kernels for weights in fewer bits. The formats and the plain arithmetic they must match are in `quantized.py`.

All are bound by memory: each weight is read once in its own format and written once in full width.
"""

# Kernels are written without type annotations: Triton reads its own from them.
import torch
import triton
import triton.language as tl
from torch import Tensor

from trainwright.model.kernels import quantized
from trainwright.model.kernels.quantized import FP8_LEAST_SCALE, FP8_MAX, Kind, Pieces


@triton.jit
def _peaks(absmax, scales, offset, dynamic, block, inside, NESTED: tl.constexpr):
    """absmax of nf4 blocks `block`, float32; looked up and rescaled where it is itself in 8 bits."""
    if NESTED:
        level = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scales + block // 256, mask=inside, other=0.0)
        peak = tl.load(dynamic + level) * scale + tl.load(offset)
    else:  # not a second return: Triton compiles what follows a return too, and wants one type
        peak = tl.load(absmax + block, mask=inside, other=0.0)
    return peak


@triton.jit
def _nf4_kernel(
    codes, absmax, scales, offset, table, dynamic, out, num_blocks, NESTED: tl.constexpr, BLOCKS: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    peak = _peaks(absmax, scales, offset, dynamic, block, inside, NESTED)[:, None]
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    pair = tl.load(codes + byte, mask=inside[:, None], other=0).to(tl.int32)
    values = tl.interleave(tl.load(table + (pair >> 4)) * peak, tl.load(table + (pair & 15)) * peak)
    place = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + place, values.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _int8_kernel(codes, absmax, out, columns, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    values = tl.load(codes + row * columns + column, mask=inside, other=0).to(tl.float32)
    values *= tl.load(absmax + row) / 127.0
    tl.store(out + row * columns + column, values.to(out.dtype.element_ty), mask=inside)


def dequantize(kind: Kind, pieces: Pieces, columns: int, dtype: torch.dtype) -> Tensor:
    """`quantized.dequantize_plain` in one kernel; `columns` is a multiple of 64."""
    pieces = [piece.contiguous() for piece in pieces]
    codes = pieces[0]
    if kind == "fp8":
        return quantized.dequantize_plain(kind, pieces, columns, dtype)
    out = torch.empty(*codes.shape[:-1], columns, dtype=dtype, device=codes.device)
    if kind == "int8":
        rows = codes.numel() // columns
        grid = (rows, triton.cdiv(columns, 4096))
        _int8_kernel[grid](codes.view(torch.int8), pieces[1], out, columns, WIDTH=4096, num_warps=8)
        return out
    table, dynamic = quantized.tables(codes.device)
    nested = len(pieces) == 4
    scales, offset = pieces[2:] if nested else (pieces[1], pieces[1])
    count = out.numel() // 64
    _nf4_kernel[(-(-count // 64),)](
        codes, pieces[1], scales, offset, table, dynamic, out, count, NESTED=nested, BLOCKS=64, num_warps=4
    )
    return out


@triton.jit
def _fp8_rows_kernel(
    x, factor, codes, scale, columns: tl.constexpr,
    LIMIT: tl.constexpr, LEAST: tl.constexpr, SCALED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    highest = tl.zeros([WIDTH], dtype=tl.float32)
    for begin in range(0, columns, WIDTH):
        inside = begin + column < columns
        values = tl.load(x + row * columns + begin + column, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            values *= tl.load(factor + begin + column, mask=inside, other=0.0)
        highest = tl.maximum(highest, tl.abs(values))
    unit = tl.maximum(tl.max(highest, 0) / LIMIT, LEAST)
    tl.store(scale + row, unit)
    for begin in range(0, columns, WIDTH):
        inside = begin + column < columns
        values = tl.load(x + row * columns + begin + column, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            values *= tl.load(factor + begin + column, mask=inside, other=0.0)
        values = tl.minimum(tl.maximum(values / unit, -LIMIT), LIMIT)
        tl.store(codes + row * columns + begin + column, values.to(tl.float8e4nv), mask=inside)


def to_fp8_rows(x_MK: Tensor, factor_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x times `factor` as float8_e4m3fn codes [M, K] with a float32 scale a row [M, 1]."""
    x_MK = x_MK.contiguous()
    rows, columns = x_MK.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x_MK.device)
    scale = torch.empty(rows, 1, device=x_MK.device)
    factor = x_MK if factor_K is None else factor_K.contiguous()
    _fp8_rows_kernel[(rows,)](
        x_MK, factor, codes, scale, columns,
        LIMIT=FP8_MAX, LEAST=FP8_LEAST_SCALE, SCALED=factor_K is not None, WIDTH=4096, num_warps=8,
    )  # fmt: skip
    return codes, scale


@triton.jit
def _transpose_kernel(x, out, rows, columns, SIZE: tl.constexpr):
    row = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(x + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0)
    target = column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out + target, tl.trans(tile), mask=(column < columns)[:, None] & (row < rows)[None, :])


def transpose_bytes(x: Tensor) -> Tensor:
    """x.t() with its own memory, for uint8 [R, C]."""
    rows, columns = x.shape
    out = torch.empty(columns, rows, dtype=x.dtype, device=x.device)
    _transpose_kernel[(triton.cdiv(rows, 128), triton.cdiv(columns, 128))](x, out, rows, columns, SIZE=128, num_warps=8)
    return out
