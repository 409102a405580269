"""Expert parallel: each rank holds some of every layer's experts, and tokens travel to theirs and back.

No token is dropped and none is padded: ranks tell each other how many rows come, then send just those (all-to-all,
Lepikhin et al. 2021, section 3.2). An expert's gradient sums over all tokens that reached it, wherever they came from.

Owns the journey of the rows, and the experts' weights on the axes ep and tp together. Inside one tensor-parallel group
every rank sends the same rows and has a slice of each expert's width, by `tensor.py`'s table, which also adds up what
comes out. Routing is the model's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from trainwright.model.kernels.rows import permute
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
            experts.forward = Journey(experts.forward, group)  # type: ignore[method-assign]


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
    """The forward of `Experts` where each rank has some of them: rows [M, H] and counts [E] -> rows [M, H]."""

    def __init__(self, inner: Callable[[Tensor, Tensor], Tensor], group: dist.ProcessGroup) -> None:
        self.inner, self.group = inner, group

    @torch.compiler.disable  # each step has other numbers of rows, and each would be compiled anew
    def __call__(self, x_MH: Tensor, counts_E: Tensor) -> Tensor:
        come_RE = self._announce(counts_E)
        leave_R = counts_E.view(self.group.size(), -1).sum(1)
        leave, come = torch.stack([leave_R, come_RE.sum(1)]).tolist()  # the one wait for the device
        arrived = all_to_all(x_MH, self.group, send=leave, receive=come)
        order, places = by_expert(come_RE, sum(come))
        out = self.inner(permute(arrived, order, places), come_RE.sum(0))
        return all_to_all(permute(out, places, order), self.group, send=come, receive=leave)

    def _announce(self, counts_E: Tensor) -> Tensor:
        """[ranks, own experts]: how many rows each rank sends to each of this rank's experts."""
        come_E = torch.empty_like(counts_E)
        dist.all_to_all_single(come_E, counts_E, group=self.group)
        return come_E.view(self.group.size(), -1)


def by_expert(come_RE: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """`rows` in all arrive ordered by rank, then expert: the index that orders them by expert, then rank, and its
    inverse. A block moves as a whole, by the distance between its starts in both orders."""
    come_ER = come_RE.T
    start_RE = _starts(come_RE)
    new_start_RE = _starts(come_ER).T
    place = torch.arange(rows, device=come_RE.device)
    back, forth = (start_RE - new_start_RE).T.flatten(), (new_start_RE - start_RE).flatten()
    order = place + torch.repeat_interleave(back, come_ER.flatten(), output_size=rows)
    return order, place + torch.repeat_interleave(forth, come_RE.flatten(), output_size=rows)


def _starts(counts: Tensor) -> Tensor:
    """Where each block begins when they stand one after the other, row by row."""
    flat = counts.flatten()
    return (flat.cumsum(0) - flat).view(counts.shape)
