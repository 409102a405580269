"""One kernel over many tensors: where they are, and which of them each program works on.

One start for each parameter would cost the host more than an update costs the device: 448 adapters of a Llama-3-8B are
168 million numbers. So a kernel reads from a table where each parameter's tensors are (as Apex's multi-tensor apply).
"""

# Kernels are written without type annotations: Triton reads its own from them.
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainwright.device import upload

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def address(row, number, count_of_tensors, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor in a table's row `number`; `row` points to this item's first. ALIGNED: it begins at a whole read."""
    pointer = tl.load(row + number * count_of_tensors).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


def addresses(items: Sequence[Sequence[Tensor]], device: torch.device) -> tuple[Tensor, bool]:
    """([tensors of an item, items] int64 on the device, whether all begin where 16 bytes are read at once)."""
    table = torch.tensor([[tensor.data_ptr() for tensor in item] for item in items])
    return upload(table.t().contiguous(), device), not (table % 16).any()


@lru_cache(maxsize=8)
def owners(programs: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """How many programs each item takes -> ([programs] the item of each, [items] the first program of each)."""
    counts = torch.tensor(programs)
    number = torch.int16 if len(programs) < 2**15 else torch.int32  # one for some thousand numbers adds up
    items = torch.arange(len(programs), dtype=number).repeat_interleave(counts)
    return items.to(device), (counts.cumsum(0) - counts).to(device, torch.int32)


@lru_cache(maxsize=8)
def numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 on the device."""
    return torch.tensor(values, device=device)
