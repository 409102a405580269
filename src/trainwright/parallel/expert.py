"""Expert parallel: each rank holds some of every layer's experts, and tokens travel to theirs and back.

A token's row goes once to each rank that holds any of its experts, with their weights; what they give is summed there,
and one row comes back. No token is dropped and none is padded: ranks tell each other how many rows come, then send just
those (all-to-all, Lepikhin et al. 2021, section 3.2). An expert's gradient sums over all tokens that reached it,
wherever they came from.

Owns the journey of the rows, and the experts' weights on the axes ep and tp together. Inside one tensor-parallel group
every rank sends the same rows and has a slice of each expert's width, by `tensor.py`'s table, which also adds up what
comes out: sums of parts come back. Routing, and what happens where rows have arrived, are the model's.

Names: M tokens with C choices each, R ranks, N rows that leave or, on the other side, that have come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from trainwright.model.kernels.rows import collect, spread
from trainwright.model.moe import Experts
from trainwright.model.transformer import Transformer
from trainwright.parallel.collectives import exchange
from trainwright.parallel.local import View, distribute, view_locally
from trainwright.parallel.tensor import OUTSIDE, TABLE, Rule, with_scales


def apply_experts(model: Transformer, mesh: DeviceMesh) -> None:
    """Spreads the experts of every sparse layer over `mesh`, [ep] or [ep, tp], in place, also on the meta device.

    Every rank of the axis ep brings its own tokens, those of tp the same ones. The degrees divide the numbers of
    experts and their width (`layout.check_model`).
    """
    for experts in model.modules():
        if isinstance(experts, Experts):
            for name, child in experts.named_children():
                rule = TABLE[Experts][name] if mesh.ndim == 2 else OUTSIDE
                _place(child, rule, mesh)
            group = mesh["ep"].get_group()
            experts.num_experts //= group.size()
            experts.forward = Journey(experts.forward, group, experts.num_experts)  # type: ignore[method-assign]


def _place(linear: nn.Module, rule: Rule, mesh: DeviceMesh) -> None:
    """Every parameter [experts, ...] is cut by expert, and inside by width as the rule says."""
    rule, views = with_scales(linear, rule), {}
    for name, parameter in list(linear.named_parameters(recurse=False)):
        place = rule.get(name) or rule["*"]
        inner = (place.placement,) if mesh.ndim == 2 else ()
        linear._parameters[name] = distribute(parameter, mesh, (Shard(0), *inner))
        views[name] = View(partial=mesh.ndim == 2 and place.partial)
    view_locally(linear, views)


class Journey:
    """The forward of `Experts` where each rank has `own` of them: x [M, H], weights [M, C], chosen [M, C] -> [M, H].

    `inner` is that of a rank's own experts, for the rows that have arrived.
    """

    def __init__(self, inner: Callable[..., Tensor], group: dist.ProcessGroup, own: int) -> None:
        self.inner, self.group, self.own = inner, group, own

    @torch.compiler.disable  # each step has other numbers of rows, and each would be compiled anew
    def __call__(self, x_MH: Tensor, weights_MC: Tensor, chosen_MC: Tensor) -> Tensor:
        with torch.no_grad():
            rank_R = torch.arange(self.group.size(), device=x_MH.device)
            mine_MRC = (chosen_MC // self.own)[:, None] == rank_R[:, None]
            order, places_MR = line_up(mine_MRC.any(-1))
            leave, come, choices = self._announce(mine_MRC)
        route, line = Route(leave, come, self.group), (order[: sum(leave)], places_MR)
        arrived_NH, weights_NC, chosen_NC = _Depart.apply(x_MH, weights_MC, chosen_MC, *line, route, self.own)
        return _Return.apply(self.inner(arrived_NH, weights_NC, chosen_NC, choices), *line, route)

    def _announce(self, mine_MRC: Tensor) -> tuple[list[int], list[int], int]:
        """Rows that go to each rank and that come from each, and how many choices come with them all."""
        choices_MR = mine_MRC.sum(-1)
        leave_R2 = torch.stack([choices_MR.sign().sum(0), choices_MR.sum(0)], 1)
        come_R2 = torch.empty_like(leave_R2)
        dist.all_to_all_single(come_R2, leave_R2, group=self.group)
        numbers = torch.cat([leave_R2, come_R2], 1).tolist()  # the one wait for the device
        leave, _, come, choices = zip(*numbers, strict=True)
        return list(leave), list(come), sum(choices)


@dataclass(frozen=True)
class Route:
    """How many rows leave for each rank, and how many come from it."""

    leave: list[int]
    come: list[int]
    group: dist.ProcessGroup

    def out(self, rows: Tensor) -> Tensor:
        return exchange(rows, self.group, send=self.leave, receive=self.come)

    def back(self, rows: Tensor) -> Tensor:
        return exchange(rows, self.group, send=self.come, receive=self.leave)


# The journey is never compiled, and its host's time counts: one node each way, exchange and gathers together.


class _Depart(torch.autograd.Function):
    """Each row in one piece with its letter: its weights, and the numbers of its experts as floats. The weights of
    other ranks' experts arrive as 0, the numbers as `own`; the weights' gradients come back with those of the rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MH: Tensor,
        weights_MC: Tensor,
        chosen_MC: Tensor,
        order_N: Tensor,
        places_MR: Tensor,
        route: Route,
        own: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(x_MH.dtype, torch.float32)  # it holds every number of an expert
        ctx.save_for_backward(order_N, places_MR)
        ctx.route, ctx.wide, ctx.of_weights = route, wide, weights_MC.dtype
        packed = pack(x_MH, torch.cat([weights_MC.to(wide), chosen_MC.to(wide)], 1))
        arrived_NH, letters_ND = unpack(route.out(spread(packed, order_N, places_MR)), x_MH.shape[1], wide)
        weights_NC, numbers_NC = letters_ND.chunk(2, 1)
        chosen_NC = numbers_NC.long() - own * route.group.rank()
        here_NC = (chosen_NC >= 0) & (chosen_NC < own)
        chosen_NC = torch.where(here_NC, chosen_NC, own)
        ctx.mark_non_differentiable(chosen_NC)
        return arrived_NH, torch.where(here_NC, weights_NC, 0.0), chosen_NC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        order_N, places_MR = ctx.saved_tensors
        rows_NH, letters_NC = unpack(ctx.route.back(pack(*grads[:2])), grads[0].shape[1], ctx.wide)
        of_x = collect(rows_NH, order_N, places_MR) if ctx.needs_input_grad[0] else None
        return of_x, weights_back(letters_NC, order_N, places_MR).to(ctx.of_weights), None, None, None, None, None


class _Return(torch.autograd.Function):
    """One row for each that came, and their sum where it belongs."""

    @staticmethod
    def forward(ctx: Any, mixed_NH: Tensor, order_N: Tensor, places_MR: Tensor, route: Route) -> Tensor:
        ctx.save_for_backward(order_N, places_MR)
        ctx.route = route
        return collect(route.back(mixed_NH), order_N, places_MR)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.route.out(spread(grads[0], *ctx.saved_tensors)), None, None, None


def pack(rows: Tensor, letters: Tensor) -> Tensor:
    """Bit for bit in the rows' type, which is no wider than that of the letters."""
    return torch.cat([rows, letters.contiguous().view(rows.dtype)], 1)


def unpack(packed: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(the rows, a view; the letters, a copy, so that keeping them keeps no rows)."""
    return packed[:, :width], packed[:, width:].clone(memory_format=torch.contiguous_format).view(dtype)


def weights_back(letters_NC: Tensor, order_N: Tensor, places_MR: Tensor) -> Tensor:
    """The gradients of a token's weights [M, C]: of each rank those of its experts, 0 of the others."""
    return collect(letters_NC, order_N, places_MR)


def line_up(reach_MR: Tensor) -> tuple[Tensor, Tensor]:
    """Which token goes to which rank -> (the numbers m x R + r of those that do, by rank and then token, and behind
    them what means nothing; the place of each in that line [M, R], M x R for those that do not go)."""
    size = reach_MR.numel()
    reach_RM = reach_MR.T
    line_RM = reach_RM.flatten().cumsum(0).view_as(reach_RM) - 1
    places_MR = torch.where(reach_RM, line_RM, size).T.contiguous()
    order = torch.empty(size + 1, dtype=places_MR.dtype, device=places_MR.device)
    # How many go is not known on the host yet: those that do not are all written behind the line.
    return order.scatter_(0, places_MR.flatten(), torch.arange(size, device=order.device)), places_MR
