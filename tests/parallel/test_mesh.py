"""Every rank's neighbours along every axis, for layouts of up to 8 processes."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.parallel.worlds import run, world_of
from trainwright.parallel.layout import Layout

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "replicate", "shard", "ep", "expert_shard")


def neighbours(layout: Layout) -> dict[str, list[int]]:
    """The ranks along each axis, as the process groups themselves see them."""
    world = world_of(layout)
    found = {}
    for name in AXES:
        mesh = world.axis(name)
        if mesh is not None:
            assert mesh.mesh.tolist() == dist.get_process_group_ranks(mesh.get_group())
            assert mesh.get_local_rank() == mesh.mesh.tolist().index(world.rank)
            found[name] = mesh.mesh.tolist()
    found["data"] = [world.data_rank]
    return found


def test_axes_are_outermost_first() -> None:
    by_rank = run(8, neighbours, Layout(world_size=8, pp=2, cp=2, tp=2))
    assert by_rank[0] == {"pp": [0, 4], "cp": [0, 2], "tp": [0, 1], "shard": [0, 2], "data": [0]}
    assert by_rank[7] == {"pp": [3, 7], "cp": [5, 7], "tp": [6, 7], "shard": [5, 7], "data": [0]}


def test_fsdp_shards_over_data_and_sequence_ranks() -> None:
    by_rank = run(8, neighbours, Layout(world_size=8, dp_replicate=2, cp=2, ep=4))
    assert by_rank[5]["shard"] == [4, 5, 6, 7]
    assert by_rank[5]["dp_shard"] == [5, 7]
    assert by_rank[5]["cp"] == [4, 5]
    assert by_rank[5]["replicate"] == by_rank[5]["dp_replicate"] == [1, 5]
    assert by_rank[5]["ep"] == [4, 5, 6, 7]
    assert "expert_shard" not in by_rank[5]
    assert [found["data"][0] for found in by_rank] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_zero_0_replicates_over_all_of_them() -> None:
    by_rank = run(8, neighbours, Layout(world_size=8, cp=2, tp=2, zero=0, ep=2))
    assert by_rank[0]["replicate"] == [0, 2, 4, 6]
    assert "shard" not in by_rank[0]
    assert by_rank[2]["cp"] == [0, 2]
    assert by_rank[2]["ep"] == [0, 2]
    assert by_rank[3]["dp_shard"] == [3, 7]


def test_experts_share_the_data_ranks_the_other_way() -> None:
    by_rank = run(8, neighbours, Layout(world_size=8, tp=2, ep=2))
    assert by_rank[0]["ep"] == [0, 2]
    assert by_rank[0]["expert_shard"] == [0, 4]
    assert by_rank[3]["shard"] == [1, 3, 5, 7]


def sums(layout: Layout) -> list[float]:
    """Each row counted once, though pp x cp x tp processes read it."""
    world = world_of(layout)
    rows = torch.tensor([1.0 + world.data_rank], dtype=torch.float64)
    return [world.sum(rows, copies=layout.row_copies).item(), float(len(world.gather(world.rank)))]


def test_sums_count_copies_once() -> None:
    for layout in (Layout(world_size=4, tp=2), Layout(world_size=4, pp=2), Layout(world_size=4, cp=2, zero=0)):
        assert run(4, sums, layout) == [[3.0, 4.0]] * 4
