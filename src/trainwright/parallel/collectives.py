"""Collectives that gradients flow through: what activations need, on torch's functional operators (which compile).

Each is the linear map that its name says, and its backward is the transposed map. Collectives on parameters and
gradients belong to FSDP and DTensor, those of the trainer to `mesh.py`.

Around the parts of a layer, tensor parallelism uses six, named by what they turn into what. `whole`: every rank holds
the same values and the same gradient. `split`: each holds its part along a dim. `partial`: the truth is the ranks' sum.

    gather_partial   split -> whole values, gradient partial    all-gather     / reduce-scatter
    scatter_sum      partial -> split                           reduce-scatter / all-gather
    gather           split -> whole                             all-gather     / own part
    split            whole -> split                             own part       / all-gather
    sum_partial      partial -> whole                           all-reduce     / identity
    spread           whole -> whole values, gradient partial    identity       / all-reduce
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
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return exchange(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return exchange(grads[0], ctx.group), None


def exchange(
    x: Tensor, group: dist.ProcessGroup, *, send: list[int] | None = None, receive: list[int] | None = None
) -> Tensor:
    """Without a gradient: `send[r]` rows of x to rank r, `receive[r]` rows from it; equal parts by default."""
    even = [x.shape[0] // group.size()] * group.size()
    return _wait(_functional.all_to_all_single(x.contiguous(), receive or even, send or even, group.group_name))


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows of x (dim 0) to their ranks, in equal parts."""
    made: Tensor = _AllToAll.apply(x, group)
    return made


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


# ---- around the parts of a layer ----


def _gathered(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The ranks' parts joined along `dim`; where the dims before it are 1, nothing is copied."""
    whole = _wait(_functional.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))
    if all(size == 1 for size in x.shape[:dim]):  # a view, and a form that the compiler joins with a matmul
        return whole.view(*x.shape[:dim], -1, *x.shape[dim + 1 :])
    return whole.unflatten(0, (-1, x.shape[0])).movedim(0, dim).flatten(dim, dim + 1)


def _scattered(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part, along `dim`, of the sum."""
    shape = (*x.shape[:dim], -1, *x.shape[dim + 1 :])
    if all(size == 1 for size in x.shape[:dim]):
        x = x.flatten(0, dim)
    else:
        x = x.unflatten(dim, (group.size(), -1)).movedim(dim, 0).flatten(0, 1)
    return _wait(_functional.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)).view(shape)


def _own_part(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    return x.chunk(group.size(), dim)[group.rank()].clone(memory_format=torch.contiguous_format)


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _wait(_functional.all_reduce(x.contiguous(), "sum", group.group_name))


class _GatherPartial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gathered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _scattered(grads[0], ctx.dim, ctx.group), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _scattered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(grads[0], ctx.dim, ctx.group), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gathered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _own_part(grads[0], ctx.dim, ctx.group), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _own_part(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(grads[0], ctx.dim, ctx.group), None, None


class _SumPartial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.group), None


def gather_partial(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The whole of a split tensor, for work of which each rank does a part."""
    return _GatherPartial.apply(x, dim, group)


def scatter_sum(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of the sum of all ranks' x; the number of ranks divides its size along `dim`."""
    return _ScatterSum.apply(x, dim, group)


def gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The whole of a split tensor, for work that every rank repeats."""
    return _Gather.apply(x, dim, group)


def split(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of a tensor that every rank holds whole."""
    return _Split.apply(x, dim, group)


def sum_partial(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' x, for work that every rank repeats."""
    return _SumPartial.apply(x, group)


def spread(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x itself, for work of which each rank does a part."""
    return _Spread.apply(x, group)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself; its gradient is multiplied."""
    fixed = x.detach()
    return fixed + (x - fixed) * factor
