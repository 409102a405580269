"""Rows of a table by their ids. Owns the gradient of the table, and the choice between Triton and torch's own.

torch's gradient on CUDA, for more than 3,072 ids, sums pieces of each row's ids into a float32 tensor of up to one row
an id, and those into the gradient, when the gradients of all other weights exist: the fullest moment of a step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainwright.model.kernels import has_triton


def embedding(ids: Tensor, weight_VH: Tensor, padding_idx: int | None = None) -> Tensor:
    """[...] int -> [..., H] in the weight's dtype; its row `padding_idx`, 0 or above, gets no gradient."""
    if torch.is_grad_enabled() and weight_VH.requires_grad and _has_kernel(ids, weight_VH):
        made: Tensor = _Embedding.apply(ids, weight_VH, padding_idx)
        return made
    return F.embedding(ids, weight_VH, padding_idx)


def _has_kernel(ids: Tensor, weight: Tensor) -> bool:
    # Compiled or of another class (DTensor, a fake one), the lookup is an operation that others look into.
    if torch.compiler.is_compiling() or type(ids) is not Tensor or type(weight) not in (Tensor, nn.Parameter):
        return False
    narrow = weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return narrow and ids.is_cuda and weight.is_cuda and has_triton()


class _Embedding(torch.autograd.Function):
    """Keeps the ids alone: FSDP does not gather the table again for its gradient."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VH: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.padding_idx = weight_VH.shape[0], padding_idx
        return F.embedding(ids, weight_VH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        from trainwright.model.kernels.triton_embedding import table_gradient

        (ids,) = ctx.saved_tensors
        grad_MH = grads[0].reshape(ids.numel(), grads[0].shape[-1])
        return None, table_gradient(grad_MH, ids.flatten(), ctx.rows, ctx.padding_idx), None
