"""Numbers of one type in another.

torch's kernels from 16 bits to 32, or of two types, read number by number: at half of the memory's rate or less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainwright.model.kernels import has_triton


def cast(x: Tensor, dtype: torch.dtype, factor: Tensor | None = None) -> Tensor:
    """x, times factor [] (float32) where there is one, in `dtype`, in one pass; x itself where nothing changes."""
    if factor is None and x.dtype == dtype:
        return x
    if x.is_cuda and x.is_contiguous() and max(x.dtype.itemsize, dtype.itemsize) <= 4 and has_triton():
        from trainwright.model.kernels import triton_cast

        return triton_cast.cast(x, dtype, factor)
    return x.to(dtype) if factor is None else torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))
