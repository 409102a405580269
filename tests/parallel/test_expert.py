"""The journey of rows to their experts and back."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parallel.worlds import run, world_of
from trainwright.model.config import MoeConfig
from trainwright.model.moe import Moe
from trainwright.parallel.expert import Journey, by_expert
from trainwright.parallel.layout import Layout


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_rows_are_ordered_by_expert_then_rank(ranks, own, data):
    counts = [[data.draw(st.integers(0, 4)) for _ in range(own)] for _ in range(ranks)]
    arrived = [(expert, rank, i) for rank in range(ranks) for expert in range(own) for i in range(counts[rank][expert])]
    order, places = (index.tolist() for index in by_expert(torch.tensor(counts), len(arrived)))
    assert [arrived[i] for i in order] == sorted(arrived)
    assert [order[place] for place in places] == list(range(len(arrived)))


def journey(skewed: bool) -> bool:
    """Every row comes back to its place from the expert that it was sent to: expert e multiplies by e + 1."""
    world = world_of(Layout(world_size=4, ep=4))
    mesh = world.axis("ep")
    assert mesh is not None
    first = 2 * mesh.get_local_rank()

    def experts(x_MH: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        number = torch.arange(first, first + 2).repeat_interleave(counts)
        return x_MH * (number + 1)[:, None]

    generator = torch.Generator().manual_seed(world.rank)
    chosen = torch.randint(0, 3 if skewed else 8, (5 * (1 + world.rank),), generator=generator).sort().values
    x = torch.randn(len(chosen), 4, generator=generator, requires_grad=True)
    out = Journey(experts, mesh.get_group())(x, torch.bincount(chosen, minlength=8))
    out.sum().backward()
    expected = (chosen + 1)[:, None].expand_as(x)
    assert x.grad is not None
    return torch.equal(out, x * expected) and torch.equal(x.grad, expected.float())


def test_rows_come_back_to_their_places():
    """Also where some experts get none: choices among the first three reach two ranks of four."""
    assert run(4, journey, False) == [True] * 4
    assert run(4, journey, True) == [True] * 4


def test_nothing_is_dropped():
    """All tokens may want one expert."""
    moe = Moe(MoeConfig.of(8, 16, 4, 1, "silu"))
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
        moe.gate.weight.zero_()
        moe.gate.weight[2] = 100.0
        out, statistics = moe(torch.ones(1, 64, 8))
    assert statistics[1].tolist() == [0, 0, 64, 0]
    assert out.abs().sum(-1).min() > 0
