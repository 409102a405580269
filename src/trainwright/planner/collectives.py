"""How long collectives take, by size, ranks and link. No torch.

Owns the cost of each kind (ring algorithms, as NCCL runs them for large messages: Thakur et al. 2005) and the axes'
ranks: how far apart they stand, so whether they talk inside a node or across nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, comb, log2
from typing import Literal

from trainwright.parallel.layout import Layout
from trainwright.planner.calibration import Calibration
from trainwright.planner.hardware import GIGA, Cluster

Axis = Literal["tp", "cp", "ep", "shard", "replicate", "pp"]


def ranks_reached(experts: int, chosen: int, ranks: int) -> float:
    """How many of the ranks that share the experts have any of a token's, in the mean, where all choices are equally
    likely: a token's row goes once to each."""
    return ranks * (1 - comb(experts - experts // ranks, chosen) / comb(experts, chosen))


@dataclass(frozen=True)
class Wires:
    """The links of a cluster as the axes of a layout use them."""

    cluster: Cluster
    calibration: Calibration
    layout: Layout
    shards: int

    def ranks(self, axis: Axis) -> tuple[int, int]:
        """(ranks along an axis, distance between neighbours), for the axes' order pp, replicate, shard, tp."""
        layout = self.layout
        ep_inside = layout.tp
        sizes = {
            "tp": (layout.tp, 1),
            "cp": (layout.cp, layout.tp),
            "ep": (layout.ep, ep_inside),
            "shard": (self.shards, layout.tp),
            "replicate": (max(1, layout.data_ranks * layout.cp // self.shards), layout.tp * self.shards),
            "pp": (layout.pp, layout.world_size // layout.pp),
        }
        return sizes[axis]

    def speed(self, axis: Axis) -> float:
        """Bytes a second that each rank of an axis can send while all do."""
        ranks, stride = self.ranks(axis)
        if ranks == 1:
            return float("inf")
        inside = ranks * stride <= self.cluster.gpus_per_node
        share = self.calibration.link if inside else self.calibration.node_link
        return self.cluster.link(ranks, stride) * share * GIGA

    def _latency(self, axis: Axis) -> float:
        """A ring passes every rank inside a node; across nodes libraries take trees, so it grows with the logarithm."""
        ranks, _ = self.ranks(axis)
        return self.calibration.latency * max(1, ceil(log2(ranks))) if ranks > 1 else 0.0

    def all_gather(self, axis: Axis, size: float) -> float:
        """Seconds until every rank has all of `size` bytes, of which each held a part. A reduce-scatter is the same."""
        ranks, _ = self.ranks(axis)
        if ranks == 1 or size == 0:
            return 0.0
        return size * (ranks - 1) / ranks / self.speed(axis) + self._latency(axis)

    reduce_scatter = all_gather

    def all_reduce(self, axis: Axis, size: float) -> float:
        """Seconds to sum `size` bytes over all ranks, everywhere."""
        return 2 * self.all_gather(axis, size)

    def all_to_all(self, axis: Axis, size: float) -> float:
        """Seconds until each rank's `size` bytes are spread over all ranks. Sends and receives of pairs reach half of
        what a ring does: 134 GB/s each way between two H200 (experts' rows, `benchmarks/speed_gpu.py`, row moe2)."""
        return 2 * self.all_gather(axis, size)

    def send(self, axis: Axis, size: float) -> float:
        """Seconds to hand `size` bytes to the next rank."""
        ranks, _ = self.ranks(axis)
        return size / self.speed(axis) + self.calibration.latency if ranks > 1 else 0.0
