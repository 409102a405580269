"""Whole gradients of micro batches, added up in float32 at the memory's rate.

Where gradients are summed over the ranks once a step (pipelines, ZeRO 0 and 1), FSDP adds each micro batch's to a
float32 sum by `+=`. torch's kernel for operands of two types reads number by number, at half of the rate of the memory
(2.3 of an H200's 4.2 TB/s), and those sums are 10 bytes a weight and micro batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from trainwright.model.kernels import has_triton
from trainwright.parallel.local import own_part


def accumulate_fast() -> None:
    """From now on FSDP adds gradients up by `accumulate`. It has no public place for that."""
    FSDPParam.accumulate_unsharded_grad_if_needed = _accumulate_if_needed  # type: ignore[assignment, method-assign]


def accumulate(total: Tensor, grad: Tensor) -> None:
    """total += grad, in place; the sum is made in total's type."""
    total, grad = own_part(total), own_part(grad)
    plain = all(part.is_cuda and part.is_contiguous() for part in (total, grad))
    if plain and total.dtype == torch.float32 != grad.dtype and has_triton():
        from trainwright.parallel.triton_accumulate import add

        add(total, grad)
    else:
        total += grad


def _accumulate_if_needed(held: FSDPParam) -> None:
    total = held.unsharded_accumulated_grad
    if total is not None and (grad := held.unsharded_param.grad) is not None:
        accumulate(total, grad)
        held.unsharded_param.grad = None
