"""The journey of rows to their experts and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from tests.parallel import models
from tests.parallel.test_mutants import replaced
from tests.parallel.worlds import run, world_of
from trainwright.model.config import MoeConfig
from trainwright.model.moe import Experts, Moe
from trainwright.model.transformer import Transformer
from trainwright.parallel import shard
from trainwright.parallel.apply import parallelize
from trainwright.parallel.expert import Journey, apply_experts, line_up
from trainwright.parallel.layout import Layout
from trainwright.recipe.parallel import ParallelRecipe

EXPERTS, OWN, CHOICES, WIDTH = 8, 2, 3, 4


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 6), st.integers(1, 4), st.data())
def test_rows_stand_in_line_by_rank_then_token(tokens, ranks, data):
    reach = [[data.draw(st.booleans()) for _ in range(ranks)] for _ in range(tokens)]
    order, places = line_up(torch.tensor(reach, dtype=torch.bool).view(tokens, ranks))
    line = [(rank, token) for rank in range(ranks) for token in range(tokens) if reach[token][rank]]
    assert [(number % ranks, number // ranks) for number in order[: len(line)].tolist()] == line
    for token in range(tokens):
        for rank in range(ranks):
            place = places[token, rank].item()
            assert line[int(place)] == (rank, token) if reach[token][rank] else place >= len(line)


def choose(tokens: int, kind: str, generator: torch.Generator) -> Tensor:
    """[tokens, CHOICES], distinct experts. few: only of the first three, so that half of the ranks get nothing;
    together: all of a token's choices are on one rank where that is possible (two of them, and one more)."""
    likely = torch.rand(tokens, EXPERTS, generator=generator)
    if kind == "few":
        likely[:, CHOICES:] = -1
    if kind == "together":
        likely += 2 * (torch.arange(EXPERTS) // OWN == torch.arange(tokens)[:, None] % 4)
    return likely.topk(CHOICES).indices


def journey(kind: str) -> int:
    """Each token's sum and gradients are those of its own experts, wherever they are: expert e multiplies by e + 1.
    Returns how many rows arrived here for one that had to."""
    world = world_of(Layout(world_size=4, ep=4))
    mesh = world.axis("ep")
    assert mesh is not None
    first, seen = OWN * mesh.get_local_rank(), []

    def experts(x_NH: Tensor, weights_NC: Tensor, chosen_NC: Tensor, choices: int) -> Tensor:
        here_NC = chosen_NC < OWN
        assert here_NC.sum() == choices
        assert here_NC.any(1).all()
        assert not weights_NC[~here_NC].any()
        assert (chosen_NC <= OWN).all()
        seen.append(x_NH)
        return x_NH * (weights_NC * here_NC * (first + chosen_NC + 1)).sum(1, keepdim=True)

    generator = torch.Generator().manual_seed(world.rank)
    tokens = 5 * world.rank  # the first rank has none
    chosen = choose(tokens, kind, generator)
    x = torch.randn(tokens, WIDTH, generator=generator, requires_grad=True)
    weights = torch.rand(tokens, CHOICES, generator=generator).requires_grad_()
    upper = torch.randn(tokens, WIDTH, generator=generator)
    out = Journey(experts, mesh.get_group(), OWN)(x, weights, chosen)
    out.backward(upper)
    factor = (weights.detach() * (chosen + 1)).sum(1, keepdim=True)
    torch.testing.assert_close(out, x * factor)
    torch.testing.assert_close(x.grad, upper * factor)
    torch.testing.assert_close(weights.grad, (chosen + 1) * (upper * x.detach()).sum(1, keepdim=True))

    # Once to each rank that has any of its experts: all ranks' choices can be drawn again here.
    expected = []
    for rank in range(4):
        generator = torch.Generator().manual_seed(rank)
        theirs = choose(5 * rank, kind, generator)
        sent = torch.randn(len(theirs), WIDTH, generator=generator)
        expected.append(sent[(theirs // OWN == mesh.get_local_rank()).any(1)])
    assert torch.equal(seen[0], torch.cat(expected))
    return len(seen[0])


@pytest.mark.parametrize("kind", ["any", "few", "together"])
def test_a_row_goes_once_to_each_rank_and_comes_back_as_a_sum(kind):
    rows = run(4, journey, kind)
    if kind == "few":
        assert rows == [30, 30, 0, 0]
    else:
        assert 30 < sum(rows) < 30 * CHOICES


def lonely(layout: Layout) -> dict[str, float]:
    """How far a layer is, in its output and gradients, from one process's where only the first rank's experts are
    chosen, and the others get no row at all."""
    torch.manual_seed(0)
    whole = Moe(MoeConfig.of(8, 12, 4, 2, "silu"))
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        whole.gate.weight[2:, 0] = -50.0
    spread = copy.deepcopy(whole)
    world = world_of(layout)
    apply_experts(spread, world.meshes["ep_tp"])  # type: ignore[arg-type]
    every, upper = torch.randn(layout.ep, 1, 6, 8), torch.randn(layout.ep, 1, 6, 8)
    every[..., 0] = 1.0
    x, every = every[world.rank].requires_grad_(), every.clone().requires_grad_()
    out, _ = spread(x)
    out.backward(upper[world.rank])
    (expected, statistics) = whole(every.flatten(0, 1))
    assert statistics[1, 2:].tolist() == [0, 0]
    expected.backward(upper.flatten(0, 1))
    pairs = {"out": (out, expected[world.rank][None]), "x": (x.grad, every.grad[world.rank])}  # type: ignore[index]
    for name, parameter in spread.experts.named_parameters():
        pairs[name] = parameter.grad.full_tensor(), whole.experts.get_parameter(name).grad  # type: ignore[union-attr]
    return {name: float((ours - theirs).abs().max()) for name, (ours, theirs) in pairs.items()}


def test_a_rank_whose_experts_nobody_chose():
    for apart in run(2, lonely, Layout(world_size=2, ep=2)):
        assert len(apart) == 5
        assert max(apart.values()) < 1e-5, apart


def types(tp: int) -> list[Any]:
    """What a rank's experts are given in a layer that computes in bf16, and what their weights' gradient is."""
    seen: list[Any] = []
    real = Experts.forward

    def forward(self: Experts, x: Tensor, weights: Tensor, *rest: Any) -> Tensor:
        weights.register_hook(lambda grad: seen.append(grad.dtype))
        seen.extend([x.dtype, weights.dtype, torch.equal(weights, weights.bfloat16())])
        return real(self, x, weights, *rest)

    world = world_of(Layout(world_size=2 * tp, ep=2, tp=tp))
    with replaced(Experts, "forward", forward):
        model = Transformer(models.build("mixtral", 2))  # one layer with experts
        model.init_weights(3)
        parallelize(model, world, ParallelRecipe(ep=2, tp=tp), precision="bf16", compile_layers=False, seq_len=32)
        batch = models.batches(1, 1, 32, seed=world.rank // tp)[0]
        model(**models.inputs(batch, "mixtral")).loss_sum.backward()
    return seen


@pytest.mark.parametrize("tp", [1, 2])
def test_weights_of_the_sums_stay_float32(tp):
    for seen in run(2 * tp, types, tp):
        assert seen == [torch.bfloat16, torch.float32, False, torch.float32]


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


def left_out(layout: Layout, settings: dict[str, Any]) -> tuple[bool, Any, Any]:
    """(whether FSDP has this rank's experts, all gradients, all gradients where it has)."""
    world, recipe, found = world_of(layout), ParallelRecipe(ep=layout.ep, tp=layout.tp, **settings), []
    for alone in (shard.experts_alone, lambda _: False):
        with replaced(shard, "experts_alone", alone):
            model = Transformer(models.build("mixtral", 2))
            model.init_weights(3)
            parallelize(model, world, recipe, precision="bf16", compile_layers=False, seq_len=32)
        for seed in range(2):  # micro batches
            batch = models.batches(1, 1, 32, seed=2 * world.rank // layout.tp + seed)[0]
            shard.begin_micro_batch(model, world, last=seed == 1)
            model(**models.inputs(batch, "mixtral")).loss_sum.backward()
        grads: Any = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
        assert {grad.dtype for grad in grads.values()} == {torch.float32}
        found.append(
            (any(isinstance(part, FSDPModule) for part in model.modules() if isinstance(part, Experts)), grads)
        )
    assert found[1][0]
    return found[0][0], found[0][1], found[1][1]


@pytest.mark.parametrize(
    ("layout", "settings", "kept"),
    [
        (Layout(world_size=2, ep=2), {}, False),
        (Layout(world_size=2, ep=2), {"recompute": "selective"}, False),
        (Layout(world_size=4, ep=2, tp=2), {"recompute": "full"}, False),
        (Layout(world_size=4, ep=2), {}, True),
        (Layout(world_size=2, ep=2, zero=2), {"zero": 2}, True),
        (Layout(world_size=2, ep=2), {"offload": "optimizer"}, True),
    ],
    ids=str,
)
def test_experts_of_one_rank_are_left_out_of_fsdp(layout, settings, kept):
    """Gradients are those that FSDP gives, bit for bit."""
    for has, ours, theirs in run(layout.world_size, left_out, layout, settings):
        assert has == kept
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
