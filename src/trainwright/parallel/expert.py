"""Expert parallel: each rank holds some of every layer's experts, and tokens travel to theirs and back.

No token is dropped and none is padded: ranks first tell each other how many rows come, then send just those (all-to-all,
Lepikhin et al. 2021, section 3.2). An expert's gradient sums over all tokens that reached it, wherever they came from.

Owns the experts' weights under EP and TP, and the journey of the rows. Inside one tensor-parallel group every rank has
the same rows and a slice of each expert's width, so what leaves is a partial sum: `tensor.py` adds it up, as for any MLP.
Routing is the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from trainwright.errors import UserError
from trainwright.model.moe import Experts
from trainwright.model.transformer import Transformer
from trainwright.parallel.collectives import all_to_all


def apply_experts(model: Transformer, mesh: DeviceMesh) -> None:
    """Spreads the experts of every sparse layer over the axes `ep` and `tp` of `mesh`, whichever it has, in place.

    Works on meta tensors. Every rank of the axis `ep` brings its own tokens, those of `tp` the same ones.
    Raises UserError where ep does not divide the experts, or tp their width.
    """
    for module in model.modules():
        if isinstance(module, Experts):
            _spread(module, mesh)


def _spread(experts: Experts, mesh: DeviceMesh) -> None:
    names = mesh.mesh_dim_names or ()
    count = experts.up_proj.weight.shape[0]
    for path, module in experts.named_modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            placements = [_placement(axis, path, weight, count, mesh[axis].size()) for axis in names]
            spread = distribute_tensor(weight, mesh, placements, src_data_rank=None)
            module.register_parameter(name, nn.Parameter(spread, requires_grad=weight.requires_grad))
    group = mesh["ep"].get_group() if "ep" in names and mesh["ep"].size() > 1 else None
    experts.forward = Journey(experts, experts.forward, group)  # type: ignore[method-assign]


def _placement(axis: str, path: str, weight: Tensor, count: int, degree: int) -> Placement:
    """Experts over ep; the width inside each, output rows of gate and up, input columns of down, over tp."""
    if axis == "ep":
        if count % degree:
            near = max(n for n in range(1, count + 1) if count % n == 0 and n <= degree)
            raise UserError(f"parallel.ep={degree} does not divide {count} experts: use {near}")
        return Shard(0)
    dim = 2 if path.endswith("down_proj") else 1
    if weight.ndim < 3 or degree == 1:
        return Replicate()
    if weight.shape[dim] % degree:
        raise UserError(f"parallel.tp={degree} does not divide the experts' width {weight.shape[dim]}: use a divisor")
    return Shard(dim)


class Journey:
    """The forward of `Experts` where each rank has some of them. A function of [M, H] and [E], like the original."""

    def __init__(
        self, experts: Experts, inner: Callable[[Tensor, Tensor], Tensor], group: dist.ProcessGroup | None
    ) -> None:
        self.experts, self.inner, self.group = experts, inner, group

    def __call__(self, x_MH: Tensor, counts_E: Tensor) -> Tensor:
        if self.group is None:
            with local_weights(self.experts):
                return self.inner(x_MH, counts_E)
        come_RE = self._announce(counts_E)
        send = counts_E.view(self.group.size(), -1).sum(1)
        sizes_2R = torch.stack([send, come_RE.sum(1)]).tolist()  # the one wait for the device
        arrived = all_to_all(x_MH, self.group, send=sizes_2R[0], receive=sizes_2R[1])
        order = _by_expert(come_RE)
        with local_weights(self.experts):
            out = self.inner(arrived[order], come_RE.sum(0))
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        return all_to_all(out[back], self.group, send=sizes_2R[1], receive=sizes_2R[0])

    def _announce(self, counts_E: Tensor) -> Tensor:
        """[ranks, own experts]: how many rows each rank sends to each of this rank's experts."""
        assert self.group is not None
        come_E = torch.empty_like(counts_E)
        dist.all_to_all_single(come_E, counts_E, group=self.group)
        return come_E.view(self.group.size(), -1)


def _by_expert(come_RE: Tensor) -> Tensor:
    """Rows arrive ordered by rank, then expert; the index that orders them by expert, then rank."""
    ranks, own = come_RE.shape
    expert_R = torch.arange(own, device=come_RE.device).repeat(ranks)
    return torch.repeat_interleave(expert_R, come_RE.flatten()).argsort(stable=True)


@contextmanager
def local_weights(module: nn.Module) -> Iterator[None]:
    """Inside, this rank's shards stand before the sharded parameters; gradients flow to the parameters.

    Python looks into an instance's own dict first, so what stands there hides a parameter of the same name.
    """
    hidden = [
        (owner, name, weight.to_local())
        for owner in module.modules()
        for name, weight in owner.named_parameters(recurse=False)
        if isinstance(weight, DTensor)
    ]
    for owner, name, local in hidden:
        owner.__dict__[name] = local
    try:
        yield
    finally:
        for owner, name, _ in hidden:
            del owner.__dict__[name]
