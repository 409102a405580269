"""Weights in 4 or 8 bits: three number formats, how a weight becomes one of them, and how it comes back.

Owns the formats and their plain PyTorch arithmetic, which is the reference, and the choice of a Triton kernel
(`triton_quantized.py`) where one runs. Modules that hold such weights are adapt/'s.

A weight [..., O, I] is a list of plain tensors (`Pieces`), the codes first, scales with O where the weight has it, so
that any layout can shard them like the weight itself:

    nf4   codes uint8 [..., O, ceil(I/64) x 32], two in a byte, the first in the high half; one absmax for 64 weights
          of a row, itself in 8 bits: uint8 [..., O, ceil(I/64)], with a float32 scale for 256 of them and one float32
          offset. Without double quantization: codes and float32 absmax. QLoRA (Dettmers et al. 2023), sections 2 and 3;
          the numbers are those of bitsandbytes where 64 divides I.
    int8  codes as uint8 [..., O, I], absmax float32 [..., O, 1] of each row (Dettmers et al. 2022, section 2)
    fp8   float8_e4m3fn codes as uint8 [..., O, I], scale float32 [..., O, 1] of each row
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from trainwright.model.kernels import has_triton

Kind = Literal["nf4", "int8", "fp8"]
Pieces = list[Tensor]

NF4_BLOCK = 64
ABSMAX_BLOCK = 256
FP8_MAX = 448.0
FP8_LEAST_SCALE = 1e-30
"""Of a row of zeros; far above float32's subnormal numbers, which kernels may take for zero."""
# Rows are quantized a few at a time: the work space stays below half a GiB whatever the weight's size.
_ROWS_NUMEL = 1 << 24

# Quantiles of a normal distribution, zero among them (Dettmers et al. 2023, appendix E).
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@cache
def _nf4_code(device: torch.device) -> Tensor:
    return torch.tensor(NF4_CODE, device=device)


@cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """[256, 2]: the two values of a byte."""
    return torch.cartesian_prod(_nf4_code(device), _nf4_code(device))


@cache
def _dynamic_code(device: torch.device) -> Tensor:
    """The signed dynamic tree type (Dettmers et al. 2022, "8-bit optimizers", section 1.3): seven decades, each with
    twice the values of the one below; 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        means = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def stored(piece: Tensor) -> Tensor:
    """A piece as a module's parameter holds it: bytes as float8, whose bits are the same. FSDP of torch 2.11 takes no
    parameter that is not floating point."""
    return piece.view(torch.float8_e4m3fn) if piece.dtype == torch.uint8 else piece


def as_bytes(pieces: Pieces) -> Pieces:
    """The pieces again from what `stored` made of them."""
    return [piece.view(torch.uint8) if piece.dtype == torch.float8_e4m3fn else piece for piece in pieces]


def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """(nf4's 16 values, the dynamic type's 256), float32, for kernels."""
    return _nf4_code(device), _dynamic_code(device)


def empty_pieces(kind: Kind, shape: tuple[int, ...], *, double: bool = True) -> Pieces:
    """Unfilled pieces for a weight of this shape, on the current default device."""
    *rows, columns = shape
    if kind != "nf4":
        return [torch.empty(shape, dtype=torch.uint8), torch.empty(*rows, 1)]
    blocks = -(-columns // NF4_BLOCK)
    codes = torch.empty(*rows, blocks * NF4_BLOCK // 2, dtype=torch.uint8)
    if not double:
        return [codes, torch.empty(*rows, blocks)]
    absmax = torch.empty(*rows, blocks, dtype=torch.uint8)
    return [codes, absmax, torch.empty(-(-absmax.numel() // ABSMAX_BLOCK)), torch.empty(1)]


def num_bytes(kind: Kind, shape: tuple[int, ...]) -> int:
    """What the pieces of a weight of this shape take, double quantization included."""
    with torch.device("meta"):
        return sum(piece.nbytes for piece in empty_pieces(kind, shape))


@torch.no_grad()
def quantize(kind: Kind, weight: Tensor, *, double: bool = True, device: torch.device | None = None) -> Pieces:
    """The pieces of `weight` [..., O, I], on `device` (default: the weight's), made a few rows at a time."""
    device = device or weight.device
    columns = weight.shape[-1]
    flat = weight.reshape(-1, columns)
    step = max(1, _ROWS_NUMEL // columns)
    by_rows = {"nf4": _to_nf4, "int8": _to_int8, "fp8": _to_fp8}[kind]
    parts = [by_rows(rows.to(device).float().contiguous()) for rows in flat.split(step)]
    codes, scale = (torch.cat(part).view(*weight.shape[:-1], -1) for part in zip(*parts, strict=True))
    if kind != "nf4" or not double:
        return [codes, scale]
    return [codes, *_compress(scale)]


def _to_nf4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[R, I] -> codes [R, blocks x 32], absmax float32 [R, blocks]; a row's end is padded with zeros."""
    missing = -rows.shape[1] % NF4_BLOCK
    rows = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
    codes, absmax = _nearest(rows.reshape(-1, NF4_BLOCK), _nf4_code(rows.device))
    codes = codes.view(rows.shape[0], -1, 2)
    return codes[..., 0] << 4 | codes[..., 1], absmax.view(rows.shape[0], -1)


def _nearest(blocks: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """(index of the value of `code` nearest to each number over its block's absmax, uint8; absmax)."""
    absmax = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    return torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8), absmax


def _compress(absmax: Tensor) -> Pieces:
    """Double quantization: (codes of absmax - mean, a scale for 256 of them, the mean)."""
    offset = absmax.mean()
    flat = (absmax - offset).flatten()
    code, whole = _dynamic_code(absmax.device), flat.numel() // ABSMAX_BLOCK * ABSMAX_BLOCK
    parts = [_nearest(flat[:whole].view(-1, ABSMAX_BLOCK), code)]
    if whole < flat.numel():
        parts.append(_nearest(flat[whole:][None], code))
    codes, scales = (torch.cat([part.flatten() for part in column]) for column in zip(*parts, strict=True))
    return [codes.view(absmax.shape), scales, offset[None]]


def _to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    absmax = rows.abs().amax(-1, keepdim=True)
    codes = torch.round(rows * (127.0 / absmax.clamp(min=1e-38))).to(torch.int8)
    return codes.view(torch.uint8), absmax


def _to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = (rows.abs().amax(-1, keepdim=True) / FP8_MAX).clamp_(min=FP8_LEAST_SCALE)
    return (rows / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8), scale


def decompress(pieces: Pieces) -> Tensor:
    """nf4's absmax as float32 [..., O, blocks], from either form."""
    if len(pieces) == 2:
        return pieces[1]
    _, absmax, scales, offset = pieces
    scale = scales.repeat_interleave(ABSMAX_BLOCK)[: absmax.numel()].view(absmax.shape)
    return _dynamic_code(absmax.device)[absmax.long()] * scale + offset


def dequantize_plain(kind: Kind, pieces: Pieces, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight [..., O, columns], computed in float32 and rounded once: the reference."""
    codes = pieces[0]
    if kind == "int8":
        return (codes.view(torch.int8).float() * (pieces[1] / 127.0)).to(dtype)
    if kind == "fp8":
        return (codes.view(torch.float8_e4m3fn).float() * pieces[1]).to(dtype)
    values = torch.nn.functional.embedding(codes.int(), _nf4_pairs(codes.device)).flatten(-2)
    values = values.unflatten(-1, (-1, NF4_BLOCK)).mul_(decompress(pieces)[..., None])
    return values.flatten(-2)[..., :columns].to(dtype)


def dequantize(kind: Kind, pieces: Pieces, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight [..., O, columns] in `dtype`; one Triton kernel where there is a GPU."""
    kernel = _triton("dequantize", pieces[0], columns)
    return kernel(kind, pieces, columns, dtype) if kernel else dequantize_plain(kind, pieces, columns, dtype)


def select_rows(kind: Kind, pieces: Pieces, index: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows `index` of a weight [O, I], [..., I]: the lookup of an embedding in fewer bits."""
    chosen = [pieces[0][index], pieces[1][index]]
    if len(pieces) == 4:
        blocks = pieces[1].shape[-1]
        place = index[..., None] * blocks + torch.arange(blocks, device=index.device)
        absmax = _dynamic_code(index.device)[chosen[1].long()] * pieces[2][place // ABSMAX_BLOCK] + pieces[3]
        chosen = [chosen[0], absmax]
    return dequantize_plain(kind, chosen, columns, dtype)


def slice_rows(kind: Kind, pieces: Pieces, begin: int, end: int) -> Pieces:
    """The pieces of rows [begin, end) of a weight [O, I]; nf4's absmax comes back to float32 for them alone."""
    rows = slice(begin, end)
    if len(pieces) == 2:
        return [piece[rows] for piece in pieces]
    codes, absmax, scales, offset = pieces
    first, last = begin * absmax.shape[1], end * absmax.shape[1]
    group = torch.arange(first, last, device=absmax.device) // ABSMAX_BLOCK
    wide = _dynamic_code(absmax.device)[absmax[rows].flatten().long()] * scales[group] + offset
    return [codes[rows], wide.view(absmax[rows].shape)]


def fp8_linear(x_MI: Tensor, codes_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """x W^T [M, O] in x's dtype with both sides in float8_e4m3fn: W a scale a row, x too, found as it comes."""
    if _without_fp8(x_MI):
        return x_MI @ dequantize_plain("fp8", [codes_OI, scale_O1], x_MI.shape[1], x_MI.dtype).t()
    codes, scale_M1 = _fp8_rows(x_MI)
    # Sums in the matrix unit's own, narrower registers: usual forward, not for gradients.
    return _fp8_product(codes, scale_M1, codes_OI.view(torch.float8_e4m3fn).t(), scale_O1.t(), x_MI.dtype, fast=True)


def fp8_linear_backward(grad_MO: Tensor, codes_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """grad W [M, I] likewise. W's scales run along the summed dim: they go into the gradient before it is rounded."""
    if _without_fp8(grad_MO):
        return grad_MO @ dequantize_plain("fp8", [codes_OI, scale_O1], codes_OI.shape[1], grad_MO.dtype)
    codes, scale_M1 = _fp8_rows(grad_MO, scale_O1.flatten())
    # The matrix unit wants the summed dim of both sides to be contiguous.
    kernel = _triton("transpose_bytes", codes_OI, codes_OI.shape[1])
    weight_OI = (kernel(codes_OI) if kernel else codes_OI.t().contiguous()).t()
    ones = torch.ones(1, codes_OI.shape[1], device=codes_OI.device)
    return _fp8_product(codes, scale_M1, weight_OI.view(torch.float8_e4m3fn), ones, grad_MO.dtype)


def _fp8_rows(x_MK: Tensor, factor_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x times `factor` as (float8_e4m3fn codes [M, K], scale float32 [M, 1])."""
    kernel = _triton("to_fp8_rows", x_MK, NF4_BLOCK)
    if kernel:
        return kernel(x_MK, factor_K)
    codes, scale_M1 = _to_fp8(x_MK.float() if factor_K is None else x_MK.float() * factor_K)
    return codes.view(torch.float8_e4m3fn), scale_M1


def _without_fp8(x: Tensor) -> bool:
    """Whether this is a card whose matrix unit knows no fp8: there the base is unpacked and computed with as it is."""
    return x.is_cuda and not _has_fp8(x.device)


@cache
def _has_fp8(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 9)


def _fp8_product(
    a_MK: Tensor, scale_M1: Tensor, b_KN: Tensor, scale_1N: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    if a_MK.is_cuda and dtype == torch.bfloat16 and not (a_MK.shape[1] % 16 or b_KN.shape[1] % 16):
        scales = {"scale_a": scale_M1, "scale_b": scale_1N.contiguous()}
        return torch._scaled_mm(a_MK, b_KN, **scales, out_dtype=dtype, use_fast_accum=fast)
    return ((a_MK.float() @ b_KN.float()) * scale_M1 * scale_1N).to(dtype)


def _triton(name: str, codes: Tensor, columns: int) -> Callable[..., Any] | None:
    """The Triton kernel of this name, where device and shape allow one."""
    if codes.device.type != "cuda" or columns % NF4_BLOCK or not has_triton():
        return None
    from trainwright.model.kernels import triton_quantized

    return getattr(triton_quantized, name)
