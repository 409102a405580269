"""Gradients of micro batches and of ranks, added up in float32 at the memory's rate.

Where gradients are summed over the ranks once a step (pipelines, ZeRO 0 and 1), FSDP adds each micro batch's to a
float32 sum by `+=`. torch's kernel for operands of two types reads number by number, at half of the rate of the memory
(2.3 of an H200's 4.2 TB/s), and those sums are 10 bytes a weight and micro batch. The ranks' parts that copy engines
bring (`copies.py`) are summed where they lie: this rank's own is not copied beside the others.
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
        from trainwright.parallel import triton_sums

        triton_sums.add(total, grad)
    else:
        total += grad


def sum_parts(own: Tensor, others: Tensor, rank: int, total: Tensor) -> None:
    """total [N] = own [N] + others [R - 1, N], the other ranks' in their order, made in total's type."""
    if total.is_cuda and total.dtype == torch.float32 and has_triton():
        from trainwright.parallel import triton_sums

        triton_sums.sum_parts(own, others, rank, total)
    else:
        torch.sum(torch.stack([*others[:rank], own, *others[rank:]]), 0, dtype=total.dtype, out=total)


def _accumulate_if_needed(held: FSDPParam) -> None:
    total = held.unsharded_accumulated_grad
    if total is not None and (grad := held.unsharded_param.grad) is not None:
        accumulate(total, grad)
        held.unsharded_param.grad = None
