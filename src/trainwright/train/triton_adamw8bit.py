"""AdamW with 8-bit moments: one kernel for all parameters. The arithmetic it must match is `adamw8bit._update_plain`.

One start for each parameter would cost the host more than the update costs the device: 448 adapters of a Llama-3-8B are
168 million numbers. So the kernel reads from a table where each parameter's tensors are (as Apex's multi-tensor apply).
"""

# Kernels are written without type annotations: Triton reads its own from them.
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainwright.device import upload
from trainwright.train.adamw8bit import BLOCK, borders, code

BLOCKS = 8
"""That one program takes."""
Item = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Weight, gradient, states."""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MOMENTS = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")


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
    addresses, shapes, owners, grad_scale, found_inf,
    signed, signed_edges, unsigned, unsigned_edges,
    rate, beta1, beta2, eps, decay, count_of_tensors,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr,
    SCALED: tl.constexpr, GUARDED: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Each program takes some blocks of `SIZE` columns of one parameter; the last block of a row may be shorter."""
    at = tl.load(owners + tl.program_id(0))
    row = addresses + at
    weight = tl.load(row).to(tl.pointer_type(WEIGHT))
    grad = tl.load(row + count_of_tensors).to(tl.pointer_type(GRAD))
    first_codes = tl.load(row + 2 * count_of_tensors).to(tl.pointer_type(tl.uint8))
    first_scales = tl.load(row + 3 * count_of_tensors).to(tl.pointer_type(tl.float32))
    second_codes = tl.load(row + 4 * count_of_tensors).to(tl.pointer_type(tl.uint8))
    second_scales = tl.load(row + 5 * count_of_tensors).to(tl.pointer_type(tl.float32))
    step = tl.load(row + 6 * count_of_tensors).to(tl.pointer_type(tl.float32))
    rows, columns, begin = tl.load(shapes + 3 * at), tl.load(shapes + 3 * at + 1), tl.load(shapes + 3 * at + 2)

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
    tl.store(weight + place, new.to(WEIGHT), mask=inside)
    _compress(first, first_codes, first_scales, place, block, inside, real, signed_edges)
    _compress(second, second_codes, second_scales, place, block, inside, real, unsigned_edges)


@lru_cache(maxsize=8)
def _plan(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """([tensors, 3] rows, columns and first program of each; [programs] the tensor that each works on), int32."""
    programs = torch.tensor([triton.cdiv(rows * triton.cdiv(columns, BLOCK), BLOCKS) for rows, columns in shapes])
    begins = programs.cumsum(0) - programs
    table = torch.cat([torch.tensor(shapes), begins[:, None]], 1).to(torch.int32)
    owners = torch.arange(len(shapes), dtype=torch.int32).repeat_interleave(programs)
    return table.to(device), owners.to(device)


def update(
    items: Sequence[Item], settings: tuple[float, ...], grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """`adamw8bit._update_plain` for parameters with 8-bit moments, in place. All on one device."""
    kinds: dict[tuple[torch.dtype, torch.dtype], list[Item]] = {}
    for weight, grad, state in items:
        kinds.setdefault((weight.dtype, grad.dtype), []).append((weight, grad.contiguous(), state))
    for (weights, grads), group in kinds.items():
        device = group[0][0].device
        sizes = [(weight.numel() // weight.shape[-1], weight.shape[-1]) for weight, _, _ in group]
        shapes, owners = _plan(tuple(sizes), device)
        pointers = [[w, g, *(state[key] for key in MOMENTS), state["step"]] for w, g, state in group]
        addresses = torch.tensor([[tensor.data_ptr() for tensor in row] for row in pointers]).t().contiguous()
        lookups = [table(signed, device) for signed in (True, False) for table in (code, borders)]
        anything = group[0][2]["step"]  # where there is nothing to read
        _adamw_kernel[(len(owners),)](
            upload(addresses, device), shapes, owners,
            anything if grad_scale is None else grad_scale, anything if found_inf is None else found_inf,
            *lookups, *settings, len(group), WEIGHT=TYPES[weights], GRAD=TYPES[grads],
            SCALED=grad_scale is not None, GUARDED=found_inf is not None, SIZE=BLOCK, BLOCKS=BLOCKS, num_warps=4,
        )  # fmt: skip
