"""The loss's Triton kernel against the plain arithmetic: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch

from tests.triton_device import triton_device

DEVICE = triton_device()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [7, 4096, 10001])
@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("apart", [False, True])  # rows that begin at even places, with something else between them
def test_loss_and_gradient_are_the_plain_ones(dtype, columns, size, apart):
    from trainwright.model.kernels.cross_entropy import _widened
    from trainwright.model.kernels.triton_cross_entropy import softmax_gradient

    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, columns, generator=generator) * size).to(DEVICE)
    logits[4] -= 3 * size  # below zero throughout, by far
    labels = torch.tensor([0, columns - 1, -1, columns // 2, 3, -1], device=DEVICE)
    if apart:
        wider = logits.new_full((6, -(-columns // 8) * 8), float("nan"))
        logits = wider[:, :columns].copy_(logits)
    grad, loss = softmax_gradient(logits, labels, dtype)
    assert grad.stride() == logits.stride()
    whole = _widened(grad, logits.stride(0))
    assert whole.shape == (6, logits.stride(0))
    assert not whole[:, columns:].any()
    wide = logits.double().requires_grad_()
    plain = torch.nn.functional.cross_entropy(wide, labels, ignore_index=-1, reduction="none")
    plain.sum().backward()
    torch.testing.assert_close(loss, plain.detach().float(), rtol=1e-5, atol=2e-6 * size)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), wide.grad, rtol=2**-7, atol=1e-6 * max(1.0, size / 1e2))
    assert not grad[2].any()
    assert not loss[2]


def test_a_logit_that_is_no_number_shows():
    from trainwright.model.kernels.triton_cross_entropy import softmax_gradient

    logits = torch.zeros(3, 100, device=DEVICE)
    logits[0, 7], logits[1, 7] = float("nan"), float("inf")
    grad, loss = softmax_gradient(logits, torch.zeros(3, dtype=torch.long, device=DEVICE), torch.float32)
    assert loss.isfinite().tolist() == [False, False, True]
    assert grad.isfinite().all(1).tolist() == [False, False, True]
