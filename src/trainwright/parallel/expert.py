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

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from trainwright.model.kernels.rows import collect, spread
from trainwright.model.moe import Experts
from trainwright.model.transformer import Transformer
from trainwright.parallel.collectives import all_to_all
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
        rank_R = torch.arange(self.group.size(), device=x_MH.device)
        mine_MRC = (chosen_MC // self.own)[:, None] == rank_R[:, None]
        letters_MRD = self._letters(mine_MRC, weights_MC, chosen_MC)
        order, places_MR = line_up(mine_MRC.any(-1))
        leave, come, choices = self._announce(mine_MRC)
        order_N = order[: sum(leave)]
        arrived_NH = all_to_all(spread(x_MH, order_N, places_MR), self.group, send=leave, receive=come)
        letters_ND = spread(letters_MRD.flatten(0, 1), order_N, places_MR.view(-1, 1))
        letters_ND = all_to_all(letters_ND, self.group, send=leave, receive=come)
        weights_NC, chosen_NC = letters_ND.chunk(2, -1)
        mixed_NH = self.inner(arrived_NH, weights_NC, chosen_NC.detach().long(), choices)
        back_NH = all_to_all(mixed_NH, self.group, send=come, receive=leave)
        return collect(back_NH, order_N, places_MR)

    def _letters(self, mine_MRC: Tensor, weights_MC: Tensor, chosen_MC: Tensor) -> Tensor:
        """[M, ranks, 2 C], what goes with a row to each rank: the weights, 0 for choices of other ranks, whose
        gradients come back the same way; then that rank's numbers of the experts, as floats, `own` for none."""
        numbers_MRC = torch.where(mine_MRC, (chosen_MC % self.own)[:, None], self.own).to(weights_MC.dtype)
        return torch.cat([torch.where(mine_MRC, weights_MC[:, None], 0.0), numbers_MRC], -1)

    def _announce(self, mine_MRC: Tensor) -> tuple[list[int], list[int], int]:
        """Rows that go to each rank and that come from each, and how many choices come with them all."""
        leave_R2 = torch.stack([mine_MRC.any(-1).sum(0), mine_MRC.sum((0, 2))], 1)
        come_R2 = torch.empty_like(leave_R2)
        dist.all_to_all_single(come_R2, leave_R2, group=self.group)
        leave, come, choices = torch.stack([leave_R2[:, 0], *come_R2.T]).tolist()  # the one wait for the device
        return leave, come, sum(choices)


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
