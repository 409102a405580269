"""The token table's lookup. Owns the memory of its gradient, which comes when all other gradients are there.

Names: T tokens, V rows of the table.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainwright.model.kernels import has_triton


def embedding(ids: Tensor, weight_VH: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows of the table, [..., H]; the row `padding_idx` gets no gradient, as in `F.embedding`.

    On a GPU the gradient is a kernel of ours: torch's own sums parts in float32 of as many rows as there are tokens,
    2 GiB for 131,072 of width 4,096, beside the gradients of everything else.
    """
    ours = weight_VH.is_cuda and type(weight_VH) in (Tensor, torch.nn.Parameter) and weight_VH.dtype != torch.float64
    if ours and torch.is_grad_enabled() and weight_VH.requires_grad and has_triton():
        found: Tensor = _Embedding.apply(ids, weight_VH, padding_idx)
        return found
    return F.embedding(ids, weight_VH, padding_idx)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VH: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.padding_idx = weight_VH.shape[0], padding_idx
        return F.embedding(ids, weight_VH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        from trainwright.model.kernels.triton_embedding import gradient

        (ids,) = ctx.saved_tensors
        return None, gradient(ids.flatten(), grads[0].flatten(0, -2).contiguous(), ctx.rows, ctx.padding_idx), None
