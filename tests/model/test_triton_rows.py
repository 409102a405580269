"""The rows' Triton kernels against plain torch: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch

from tests.triton_device import triton_device

DEVICE = triton_device()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choices", [1, 2, 3, 8])
@pytest.mark.parametrize("width", [5, 600, 2048])
@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])  # of the choices that have a row
def test_sums_and_gradients_are_the_plain_ones(dtype, choices, width, share):
    from trainwright.model.kernels.rows import inverse
    from trainwright.model.kernels.triton_rows import mix_gradients, sums

    tokens = 5
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(tokens * choices, generator=draw)
    rows = int(order.numel() * share)
    order_R, places_MC = order[:rows].to(DEVICE), inverse(order).view(tokens, choices).to(DEVICE)
    x_RH = torch.randn(rows, width, generator=draw).to(DEVICE, dtype)
    weights_MC = torch.randn(tokens, choices, generator=draw).to(DEVICE)
    grad_MH = torch.randn(tokens, width, generator=draw).to(DEVICE, dtype)
    wide_RH, wide_MC = x_RH.double().requires_grad_(), weights_MC.double().requires_grad_()
    nothing_MH = wide_RH.new_zeros(tokens, width)
    token_R = order_R // choices
    plain = nothing_MH.index_add(0, token_R, wide_RH * wide_MC.flatten()[order_R][:, None])
    plain.backward(grad_MH.double())
    bounds = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-4}

    def same(given: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = dtype, **bounds: float) -> None:
        assert given.dtype == dtype
        torch.testing.assert_close(given.double(), expected.detach(), **bounds)

    same(sums(x_RH, weights_MC, places_MC), plain, **bounds)
    same(sums(x_RH, None, places_MC), nothing_MH.index_add(0, token_R, wide_RH), **bounds)
    of_rows, of_weights = mix_gradients(grad_MH, x_RH, weights_MC, places_MC)
    same(of_rows, wide_RH.grad, **bounds)
    same(of_weights, wide_MC.grad, torch.float32, rtol=1e-5, atol=1e-4)


def test_no_tokens_at_all():
    from trainwright.model.kernels.triton_rows import mix_gradients, sums

    rows, weights = torch.zeros(0, 8, device=DEVICE), torch.zeros(0, 2, device=DEVICE)
    places = torch.zeros(0, 2, dtype=torch.long, device=DEVICE)
    assert sums(rows, weights, places).shape == (0, 8)
    assert [grad.shape for grad in mix_gradients(rows, rows, weights, places)] == [(0, 8), (0, 2)]
