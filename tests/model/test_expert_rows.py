"""Rows that go to their experts and come back: what indexing and scattered sums give, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainwright.model.config import MoeConfig
from trainwright.model.kernels.rows import collect, inverse, mix, spread
from trainwright.model.moe import Experts

TOKENS, CHOICES, WIDTH = 7, 3, 5
Line = tuple[Tensor, Tensor]


@pytest.fixture(params=[TOKENS * CHOICES, 10, 0], ids=lambda rows: f"{rows} rows")
def line(request: pytest.FixtureRequest) -> Line:
    """(order_R, places_MC): all choices have a place, some of them, none."""
    order = torch.randperm(TOKENS * CHOICES, generator=torch.Generator().manual_seed(0))
    return order[: request.param], inverse(order).view(TOKENS, CHOICES)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def plain_spread(x_MH: Tensor, order_R: Tensor) -> Tensor:
    return x_MH[order_R // CHOICES]


def plain_mix(x_RH: Tensor, weights_MC: Tensor, order_R: Tensor) -> Tensor:
    weighted = x_RH * weights_MC.flatten()[order_R].to(x_RH.dtype)[:, None]
    return x_RH.new_zeros(TOKENS, WIDTH).index_add(0, order_R // CHOICES, weighted)


def test_an_inverse_undoes():
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert order[inverse(order)].tolist() == list(range(20))


def test_gradients_are_those_of_finite_differences(line):
    rows = len(line[0])
    x_MH, x_RH, weights_MC = draw(TOKENS, WIDTH), draw(rows, WIDTH), draw(TOKENS, CHOICES, seed=2)
    assert torch.autograd.gradcheck(lambda x: spread(x, *line), x_MH)
    assert torch.autograd.gradcheck(lambda x: collect(x, *line), x_RH)
    assert torch.autograd.gradcheck(lambda x, w: mix(x, w, *line), (x_RH, weights_MC))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_same_as_scattered_sums(line, compiled):
    order_R, places_MC = line

    def ours(x_MH: Tensor, weights_MC: Tensor) -> Tensor:
        out_RH = torch.tanh(spread(x_MH, order_R, places_MC))
        return mix(out_RH, weights_MC, order_R, places_MC) + collect(out_RH, order_R, places_MC)

    def plain(x_MH: Tensor, weights_MC: Tensor) -> Tensor:
        out_RH = torch.tanh(plain_spread(x_MH, order_R))
        return plain_mix(out_RH, weights_MC + 1, order_R)

    found = []
    for way in (torch.compile(ours) if compiled else ours, plain):
        x_MH, weights_MC = draw(TOKENS, WIDTH, dtype=torch.float32), draw(TOKENS, CHOICES, dtype=torch.float32, seed=2)
        out = way(x_MH, weights_MC)
        out.square().sum().backward()
        found.append((out, x_MH.grad, weights_MC.grad))
    for given, expected in zip(*found, strict=True):
        torch.testing.assert_close(given, expected)


def test_bf16_rows_are_summed_in_float32():
    """Eight rows of 1 and one of 256 are 264; added one after the other in bf16, 256 + 1 stays 256."""
    rows, weights = torch.ones(9, 1, dtype=torch.bfloat16), torch.ones(1, 9)
    rows[0] = 256
    line = torch.arange(9), torch.arange(9)[None]
    assert mix(rows, weights, *line).item() == collect(rows, *line).item() == 264
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    (spread(x, *line) * rows).sum().backward()
    assert x.grad is not None
    assert x.grad.item() == 264


def test_choices_that_are_no_expert_cost_nothing():
    """Some of a token's choices are elsewhere: the sum is that of the others, and only their rows reach an expert."""
    experts = Experts(MoeConfig.of(8, 12, 4, 2, "silu").experts)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    experts.up_proj.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    x_MH, weights_MC = draw(3, 8, dtype=torch.float32), draw(3, 2, dtype=torch.float32, seed=2)
    chosen_MC = torch.tensor([[2, 0], [4, 3], [4, 4]])
    given = experts(x_MH, weights_MC, chosen_MC, 3)
    known = torch.where(chosen_MC < 4, weights_MC, 0)
    expected = experts(x_MH, known, chosen_MC.clamp(max=3))
    assert seen == [3, 6]
    torch.testing.assert_close(given, expected)
    assert not given[2].any()
