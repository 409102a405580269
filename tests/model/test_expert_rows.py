"""Rows that go to their experts and come back: what indexing and scattered sums give, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainwright.model.kernels.rows import inverse, mix, permute, spread

TOKENS, CHOICES, WIDTH = 7, 3, 5


@pytest.fixture
def order_R() -> Tensor:
    return torch.randperm(TOKENS * CHOICES, generator=torch.Generator().manual_seed(0))


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def plain_spread(x_MH: Tensor, order_R: Tensor) -> Tensor:
    return x_MH[order_R // CHOICES]


def plain_mix(x_RH: Tensor, weights_MC: Tensor, order_R: Tensor) -> Tensor:
    weighted = x_RH * weights_MC.flatten()[order_R].to(x_RH.dtype)[:, None]
    return x_RH.new_zeros(TOKENS, WIDTH).index_add(0, order_R // CHOICES, weighted)


def test_an_inverse_undoes(order_R):
    assert order_R[inverse(order_R)].tolist() == list(range(TOKENS * CHOICES))
    x_RH = draw(TOKENS * CHOICES, WIDTH)
    there = permute(x_RH, order_R, inverse(order_R))
    assert torch.equal(there, x_RH[order_R])
    assert torch.equal(permute(there, inverse(order_R), order_R), x_RH)


def test_gradients_are_those_of_finite_differences(order_R):
    places_R = inverse(order_R)
    x_MH, x_RH, weights_MC = draw(TOKENS, WIDTH), draw(TOKENS * CHOICES, WIDTH), draw(TOKENS, CHOICES, seed=2)
    assert torch.autograd.gradcheck(lambda x: permute(x, order_R, places_R), x_RH)
    assert torch.autograd.gradcheck(lambda x: spread(x, order_R, places_R), x_MH)
    assert torch.autograd.gradcheck(lambda x, w: mix(x, w, order_R, places_R), (x_RH, weights_MC))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_same_as_scattered_sums(order_R, compiled):
    def ours(x_MH: Tensor, weights_MC: Tensor) -> Tensor:
        places_R = inverse(order_R)
        return mix(torch.tanh(spread(x_MH, order_R, places_R)), weights_MC, order_R, places_R)

    def plain(x_MH: Tensor, weights_MC: Tensor) -> Tensor:
        return plain_mix(torch.tanh(plain_spread(x_MH, order_R)), weights_MC, order_R)

    found = []
    for way in (torch.compile(ours) if compiled else ours, plain):
        x_MH, weights_MC = draw(TOKENS, WIDTH, dtype=torch.float32), draw(TOKENS, CHOICES, dtype=torch.float32, seed=2)
        out = way(x_MH, weights_MC)
        out.square().sum().backward()
        found.append((out, x_MH.grad, weights_MC.grad))
    for given, expected in zip(*found, strict=True):
        torch.testing.assert_close(given, expected)


def test_bf16_rows_are_summed_in_float32(order_R):
    """Eight rows of 1 and one of 256 are 264; added one after the other in bf16, 256 + 1 stays 256."""
    rows, weights = torch.ones(9, 1, dtype=torch.bfloat16), torch.ones(1, 9)
    rows[0] = 256
    order = torch.arange(9)
    assert mix(rows, weights, order, order).item() == 264
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    (spread(x, order, order) * rows).sum().backward()
    assert x.grad is not None
    assert x.grad.item() == 264
