"""Collectives that gradients flow through: what activations need, on torch's functional operators (which compile).

Each is the linear map that its name says, and its backward is the transposed map. Collectives on parameters and
gradients belong to FSDP and DTensor, those of the trainer to `mesh.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_functional = torch.ops._c10d_functional


def _wait(tensor: Tensor) -> Tensor:
    return _functional.wait_tensor(tensor)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.receive, ctx.send, ctx.group = receive, send, group
        return _wait(_functional.all_to_all_single(x.contiguous(), receive, send, group.group_name))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return (
            _wait(_functional.all_to_all_single(grads[0].contiguous(), ctx.send, ctx.receive, ctx.group.group_name)),
            None,
            None,
            None,
        )


def all_to_all(
    x: Tensor, group: dist.ProcessGroup, *, receive: list[int] | None = None, send: list[int] | None = None
) -> Tensor:
    """Rows of x (dim 0) to their ranks: `send[r]` rows to rank r, `receive[r]` rows from it; equal parts by default."""
    even = [x.shape[0] // group.size()] * group.size()
    return _AllToAll.apply(x, receive or even, send or even, group)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _wait(_functional.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        return _wait(_functional.reduce_scatter_tensor(grad, "sum", ctx.group.size(), ctx.group.group_name)), None


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' x, joined along dim 0; the gradient is summed over the ranks and scattered back."""
    return _AllGather.apply(x, group)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _wait(_functional.all_reduce(x.contiguous(), "sum", group.group_name))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _wait(_functional.all_reduce(grads[0].contiguous(), "sum", ctx.group.group_name)), None


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks on every rank, each of which uses it in its own part of the loss: gradients are summed too."""
    return _AllReduce.apply(x, group)
