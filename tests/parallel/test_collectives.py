"""Each collective around a layer's parts is the linear map that it says, and its gradient the transposed one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.worlds import run
from trainwright.parallel import collectives

RANKS = 2


def parts(rows: int, whole: bool) -> list[Tensor]:
    """What each rank holds: a part of 3 tokens, or 6 tokens."""
    source = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, 6 if whole else 3, 4, generator=source) for _ in range(RANKS)]


def applied(name: str, rows: int, whole: bool) -> tuple[Tensor, Tensor]:
    """(this rank's result, its input's gradient of sum(result x (rank + 1) x result's own index))."""
    group = dist.group.WORLD
    assert group is not None
    x = parts(rows, whole)[dist.get_rank()].requires_grad_()
    dim = () if name in ("sum_partial", "spread") else (1,)
    out = getattr(collectives, name)(x, *dim, group)
    (out * pull(out.shape, dist.get_rank())).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def pull(shape: torch.Size, rank: int) -> Tensor:
    """The gradient that a rank's result gets."""
    return (rank + 1) * torch.arange(shape.numel(), dtype=torch.float32).view(shape)


def joined(xs: list[Tensor]) -> Tensor:
    return torch.cat(xs, 1)


def own(x: Tensor, rank: int) -> Tensor:
    return x.chunk(RANKS, 1)[rank]


# name: (input is whole, result of a rank from all inputs, gradient of a rank from all pulls)
MAPS: dict[str, tuple[bool, Callable[[list[Tensor], int], Tensor], Callable[[list[Tensor], int], Tensor]]] = {
    "gather_partial": (False, lambda xs, r: joined(xs), lambda gs, r: own(gs[0] + gs[1], r)),
    "scatter_sum": (True, lambda xs, r: own(xs[0] + xs[1], r), lambda gs, r: joined(gs)),
    "gather": (False, lambda xs, r: joined(xs), lambda gs, r: own(gs[r], r)),
    "split": (True, lambda xs, r: own(xs[r], r), lambda gs, r: joined(gs)),
    "sum_partial": (True, lambda xs, r: xs[0] + xs[1], lambda gs, r: gs[r]),
    "spread": (True, lambda xs, r: xs[r], lambda gs, r: gs[0] + gs[1]),
}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", MAPS)
def test_map_and_gradient(name: str, rows: int) -> None:
    whole, forward, backward = MAPS[name]
    xs = parts(rows, whole)
    results = run(RANKS, applied, name, rows, whole)
    pulls = [pull(out.shape, rank) for rank, (out, _) in enumerate(results)]
    for rank, (out, grad) in enumerate(results):
        torch.testing.assert_close(out, forward(xs, rank))
        torch.testing.assert_close(grad, backward(pulls, rank))


def test_a_scaled_gradient_leaves_the_value() -> None:
    x = torch.randn(5, requires_grad=True)
    out = collectives.scale_gradient(x, 0.25)
    assert torch.equal(out, x)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.25] * 5
