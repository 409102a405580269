"""This process among its peers: rank, device, the mesh axes, and the few collectives that the trainer itself needs.

Owns joining (torchrun's environment, or a process alone), leaving, and cutting the world into axes:

    pp, dp_replicate, dp_shard, cp, tp     outermost first, so the chattiest neighbours (tp) share a machine
    replicate, shard                       what FSDP sees: zero 0 replicates over all data and sequence ranks,
                                           otherwise shard = dp_shard x cp and replicate = dp_replicate
    expert_shard, ep                       dp_shard x cp once more, cut the other way for experts

Degrees and their arithmetic are `layout.py`'s; how a model is spread over the axes is `apply.py`'s.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainwright.device import default_device
from trainwright.parallel.layout import Layout
from trainwright.recipe.parallel import ParallelRecipe


@dataclass(frozen=True)
class World:
    """One process among `layout.world_size`. Alone, every collective is the identity and there is no process group."""

    rank: int
    layout: Layout
    device: torch.device
    meshes: Mapping[str, DeviceMesh] = field(default_factory=dict, repr=False, compare=False)

    @property
    def size(self) -> int:
        return self.layout.world_size

    @property
    def is_main(self) -> bool:
        """The one that writes shared files and speaks."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which of the `layout.data_ranks` groups of rows this process reads."""
        inner = self.layout.cp * self.layout.tp
        return self.rank % (self.layout.data_ranks * inner) // inner

    def axis(self, name: str) -> DeviceMesh | None:
        """The 1-D mesh of this process's neighbours along an axis; None where the degree is 1."""
        mesh = self.meshes.get(name)
        return mesh if mesh is not None and mesh.size() > 1 else None

    def fsdp_mesh(self, experts: bool = False) -> DeviceMesh:
        """What `fully_shard` takes: [shard], or [replicate, shard]; for experts, the ranks with the same experts."""
        return self.meshes["expert_fsdp" if experts else "fsdp"]

    def sum(self, values: Tensor, *, copies: int = 1) -> Tensor:
        """The sum over all processes, where `copies` of them hold the same value. In place where there are several.

        One rank's rows are held by pp x cp x tp processes (`layout.row_copies`); a sum over a rank's tokens by tp, with
        zero on the pipeline stages that do not see the loss (`layout.token_copies`).
        """
        if self.size > 1:
            dist.all_reduce(values)
            if copies > 1:
                values /= copies
        return values

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, on every rank; small Python values only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first_error(self, error: str | None) -> str | None:
        """The lowest rank's error, the same on every rank, or None when no rank had one. A barrier as well."""
        return next((found for found in self.gather(error) if found is not None), None)

    def barrier(self) -> None:
        """On the CPU's own backend: it neither waits for the device nor holds it up."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))


def join_world(recipe: ParallelRecipe) -> World:
    """Joins the processes that a launcher started, or stands alone. Makes the accelerator current."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    layout = Layout.of(recipe, size)
    device = default_device(int(os.environ.get("LOCAL_RANK", 0)))
    if size == 1 and not in_host_memory(recipe):
        return World(rank, layout, device)
    if not dist.is_initialized():
        default = (
            "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
        )
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if size == 1 else {}
        dist.init_process_group(default, timeout=timedelta(minutes=recipe.timeout_minutes), **alone)
    return World(rank, layout, device, build_meshes(layout, device.type))


def build_meshes(layout: Layout, device_type: str) -> dict[str, DeviceMesh]:
    """Every axis by name, and `fsdp`, `expert_fsdp`. All are cuts of one mesh, as FSDP over TP and EP requires.

    The process group must exist. Axes of the same ranks share one group: each group costs buffers on the device.
    """
    # A whole tensor of two cuts of one dim takes two gathers, which torch calls suboptimal at every save.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    shard = 1 if layout.zero == 0 else layout.dp_shard * layout.cp
    replicate = layout.data_ranks * layout.cp // shard
    world = init_device_mesh(device_type, (layout.world_size,), mesh_dim_names=("world",))
    names = ("pp", "replicate", "shard", "tp")
    base = world._unflatten(0, (layout.pp, replicate, shard, layout.tp), names)
    # Axes by number: torch 2.11's _unflatten refuses every name that there is.
    if layout.zero == 0:
        inner = (layout.dp_replicate, layout.dp_shard, layout.cp)
        data = base._unflatten(names.index("replicate"), inner, ("dp_replicate", "dp_shard", "cp"))
    else:
        data = base._unflatten(names.index("shard"), (layout.dp_shard, layout.cp), ("dp_shard", "cp"))
    meshes = {name: base[name] for name in names}
    meshes |= {name: data[name] for name in ("dp_shard", "cp")}
    meshes["dp_replicate"] = data["dp_replicate" if layout.zero == 0 else "replicate"]
    meshes["fsdp"] = meshes["expert_fsdp"] = base["replicate", "shard"] if replicate > 1 else base["shard"]
    if layout.ep > 1:
        meshes |= _expert_meshes(base, layout.ep, "replicate" if layout.zero == 0 else "shard")
    return meshes


def _expert_meshes(base: DeviceMesh, ep: int, cut: str) -> dict[str, DeviceMesh]:
    """`ep` neighbours along the axis `cut` hold different experts; the rest of that axis holds the same ones."""
    rest = f"expert_{cut}"
    place = (base.mesh_dim_names or ()).index(cut)
    experts = base._unflatten(place, (base[cut].size() // ep, ep), (rest, "ep"))
    outer, inner = (rest, "shard") if cut == "replicate" else ("replicate", rest)
    fsdp = experts[outer, inner] if experts[outer].size() > 1 else experts[inner]
    both = experts["ep", "tp"] if experts["tp"].size() > 1 else experts["ep"]
    return {"ep": experts["ep"], "ep_tp": both, "expert_shard": experts[inner], "expert_fsdp": fsdp}


def in_host_memory(recipe: ParallelRecipe) -> bool:
    """Whether masters, gradients and optimizer states live in host memory; FSDP moves them, also for one process."""
    return recipe.offload in ("optimizer", "all")


def leave_world() -> None:
    """Ends the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
