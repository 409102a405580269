"""A matmul for each expert over its own tokens. Owns the choice between torch's grouped kernel and a loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainwright.model.kernels.product import linear


def has_grouped_mm(x: Tensor) -> bool:
    """Whether torch's grouped kernel takes this: bf16 on CUDA since compute capability 8.0, dims multiples of 8."""
    return x.device.type == "cuda" and x.dtype == torch.bfloat16 and x.shape[-1] % 8 == 0


def grouped_linear(x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """[M, O]: the first counts[0] rows by expert 0's weight, the next counts[1] by expert 1's, and so on.

    The loop reads the counts on the host, which waits for an accelerator; the grouped kernel never does.
    """
    if has_grouped_mm(x_MI) and weight_EOI.shape[1] % 8 == 0:
        offsets = counts_E.cumsum(0).to(torch.int32)
        return F.grouped_mm(x_MI, weight_EOI.transpose(-2, -1), offs=offsets)
    parts = x_MI.split(counts_E.tolist())
    return torch.cat([linear(part, weight) for part, weight in zip(parts, weight_EOI, strict=True)])


def describe(device: torch.device) -> str:
    return "grouped matmul" if device.type == "cuda" else "one matmul an expert"
