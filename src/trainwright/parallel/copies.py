"""FSDP's collectives inside one machine by the GPUs' copy engines, which leave the multiprocessors to the products.

NCCL moves weights and gradients with kernels: they take multiprocessors from the matmuls that they overlap with, and
a copy engine takes none. Every rank lays its part into a buffer that its peers can read (torch's symmetric memory),
and each pulls what it needs over NVLink:

    gather    the peers' shards into the buffer's other places
    reduce    the peers' gradients for this rank's shard, which it then sums in float32. The gradients travel in the
              type in which the backward pass left them: half of the bytes of a reduction in float32, the same sum

The idea is torch's own (`_low_contention_all_gather`, PyTorch #130583). Owns both collectives and their buffers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather

from trainwright.device import note_outside
from trainwright.errors import UserError
from trainwright.model.moe import Moe
from trainwright.parallel.accumulate import sum_parts
from trainwright.parallel.layout import shared_bytes
from trainwright.parallel.mesh import World
from trainwright.parallel.reduce import Reduce
from trainwright.recipe.parallel import ParallelRecipe

ALONE = 2
"""Holders of a buffer's memory that nobody has taken: the ring's tensor, and the storage that asks."""


def apply_copies(
    layers: list[nn.Module], ends: list[nn.Module], world: World, recipe: ParallelRecipe, dtype: torch.dtype | None
) -> str | None:
    """Lets copy engines move what FSDP shards of these layers, and of the model's ends (embedding, head), unless
    `parallel.fsdp_transport` says nccl.

    dtype: what FSDP casts weights to, None where it casts nothing. Returns what became of it in words, None where there
    was no choice. Where the ranks of a shard cannot read each other's memory `auto` leaves it to NCCL, and `copy`
    raises UserError.
    """
    layout, asked = world.layout, recipe.fsdp_transport == "copy"
    meshes = [world.fsdp_mesh(), world.fsdp_mesh(experts=True)] if layout.ep > 1 else [world.fsdp_mesh()]
    parts: list[list[nn.Module]] = [layers, [layer.mlp.experts for layer in layers if isinstance(layer.mlp, Moe)]]
    groups = [mesh.get_group(mesh.ndim - 1) for mesh in meshes]
    shared = [(group, part) for group, part in zip(groups, parts, strict=False) if group.size() > 1]
    able = bool(shared) and all(can_copy(group, world.device) for group, _ in shared)
    # A pipeline gathers once a step, and has a model of its own for each stage.
    if recipe.fsdp_transport == "nccl" or layout.pp > 1 or not able:
        if asked:
            raise UserError(
                "parallel.fsdp_transport=copy needs shards on several GPUs of one machine that read each other's "
                f"memory, and no pipeline; here are {groups[0].size()} on {world.device.type}, pp={layout.pp}: set nccl"
            )
        return None
    timeout_ms = int(recipe.timeout_minutes * 60_000)
    rings = [Ring(group, timeout_ms) for group, _ in shared]
    if (why := unshared(rings, world)) is not None:
        if asked:
            raise UserError(f"parallel.fsdp_transport=copy: {why}: set nccl")
        return f"shards travel by NCCL: {why}"
    # Gradients that are added up over micro batches before they are reduced are wider than the weights: NCCL's.
    wire = dtype if layout.zero >= 2 else None
    for ring, (_, part) in zip(rings, shared, strict=True):
        _use(ring, Ring(ring.group, timeout_ms), part, wire)
    # Weights and gradients of the ends are large and far apart in time: one buffer serves them all.
    ring = Ring(groups[0], timeout_ms)
    _use(ring, ring, ends, wire)
    return "shards travel by copy engines"


def can_copy(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the ranks of a group are GPUs of one machine that read each other's memory."""
    if device.type != "cuda":
        return False
    local, here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), device.index or 0
    ranks = dist.get_process_group_ranks(group)
    if len({rank // local for rank in ranks}) > 1:
        return False
    return all(rank % local == here or torch.cuda.can_device_access_peer(here, rank % local) for rank in ranks)


def unshared(rings: Sequence[Ring], world: World) -> str | None:
    """Why the ranks cannot make these buffers, the first of them that says so; None where they can."""
    try:
        for ring in rings:
            ring.take(16, torch.uint8, world.device)
        why = None
    except RuntimeError as error:  # a container that shares no memory between processes, an old driver
        why = (str(error).splitlines() or ["?"])[0]
    return world.first_error(why)


def _use(gathers: Ring, sums: Ring, modules: list[nn.Module], wire: torch.dtype | None) -> None:
    gather = CopyGather(gathers)
    reduce = None if wire is None else CopyReduce(sums, wire)
    for module in cast(list[FSDPModule], modules):
        module.set_custom_all_gather(gather)
        if reduce is not None:
            module.set_custom_reduce_scatter(reduce)


class Ring:
    """Buffers that the ranks of a group can read, by size; each is handed out again once nobody holds it.

    Every rank takes them in the same order: a new one is made by all together. FSDP drops a buffer only after the
    stream that will write it next waits for its last reader, as it must for any memory of torch's own.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_ms: int) -> None:
        self.group, self.timeout_ms = group, timeout_ms
        self._buffers: dict[int, list[Tensor]] = {}
        self._handles: dict[int, Any] = {}

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[numel], not cleared."""
        size = shared_bytes(numel * dtype.itemsize)
        buffers = self._buffers.setdefault(size, [])
        free = next((buffer for buffer in buffers if _holders(buffer) == ALONE), None)
        if free is None:
            free = self._make(size, device)
            buffers.append(free)
        return free[: numel * dtype.itemsize].view(dtype)

    def _make(self, size: int, device: torch.device) -> Tensor:
        import torch.distributed._symmetric_memory as symm_mem

        raw = symm_mem.empty(size, dtype=torch.uint8, device=device)
        # torch clears the buffer and its signals on the default stream and does not wait: a peer that is ahead would
        # signal first, its signal would be cleared, and the ranks would wait for each other for ever.
        torch.cuda.default_stream(device).synchronize()
        self._handles[raw.data_ptr()] = symm_mem.rendezvous(raw, self.group.group_name)
        note_outside(size)
        return raw

    def meet(self, buffer: Tensor, channel: int) -> None:
        """Until every rank's stream has come here with its own copy of this buffer."""
        self._handles[buffer.data_ptr()].barrier(channel=channel, timeout_ms=self.timeout_ms)

    def pull(self, buffer: Tensor, peer: int, start: int, out: Tensor) -> None:
        """[start : start + len(out)] of a peer's copy of a buffer."""
        handle = self._handles[buffer.data_ptr()]
        out.copy_(handle.get_buffer(peer, out.shape, buffer.dtype, buffer.storage_offset() + start), non_blocking=True)

    def peers(self) -> list[int]:
        """The other ranks of the group, the next one first, so that each is read by one at a time."""
        rank, size = self.group.rank(), self.group.size()
        return [(rank + step) % size for step in range(1, size)]


def _holders(buffer: Tensor) -> int:
    return int(torch._C._storage_Use_Count(buffer.untyped_storage()._cdata))


class CopyGather(AllGather):
    """torch.distributed.fsdp's `AllGather`: the shard is in its place of the output already."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.ring.take(int(size[0]), dtype, device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        shard = input_tensor.numel()
        self.ring.meet(output_tensor, 0)  # all shards are in their places
        for peer in self.ring.peers():
            self.ring.pull(output_tensor, peer, peer * shard, output_tensor[peer * shard : (peer + 1) * shard])
        self.ring.meet(output_tensor, 1)  # all have read ours


class CopyReduce(Reduce):
    """A sum in the output's type of gradients that travel in `wire`; FSDP asks for both in the type of the sum."""

    def __init__(self, ring: Ring, wire: torch.dtype) -> None:
        super().__init__()
        self.ring, self.wire = ring, wire

    def make_input(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.ring.take(numel, self.wire, device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        assert op == dist.ReduceOp.SUM, op
        shard, rank = output_tensor.numel(), group.rank()
        own = input_tensor[rank * shard : (rank + 1) * shard]
        others = torch.empty(group.size() - 1, shard, dtype=self.wire, device=input_tensor.device)
        self.ring.meet(input_tensor, 0)
        for peer in self.ring.peers():
            self.ring.pull(input_tensor, peer, rank * shard, others[peer - (peer > rank)])
        self.ring.meet(input_tensor, 1)
        sum_parts(own, others, rank, output_tensor)
