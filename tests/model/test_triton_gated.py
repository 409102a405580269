"""The gated product's Triton kernels against the plain arithmetic: on a GPU, or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from tests.triton_device import INTERPRETED, triton_device

DEVICE = triton_device()

from trainwright.model.kernels.triton_gated import gradients, product  # noqa: E402


@pytest.mark.parametrize("shape", [(3, 700), (1, 2, 1024), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_the_plain_arithmetic(shape, dtype):
    draw = torch.Generator().manual_seed(0)
    gate, up, above = (torch.randn(shape, generator=draw).to(DEVICE, dtype) * 3 for _ in range(3))
    wide = [tensor.float().requires_grad_() for tensor in (gate, up)]
    expected = F.silu(wide[0]) * wide[1]
    of_gate, of_up = torch.autograd.grad(expected, wide, above.float())
    # The interpreter cuts bf16 off where the compiler rounds.
    close = (
        {"rtol": 1e-5, "atol": 1e-6}
        if dtype == torch.float32
        else {"rtol": 2**-7 if INTERPRETED else 2**-8, "atol": 1e-3}
    )
    torch.testing.assert_close(product(gate, up).float(), expected, **close)
    kept = gate.clone()
    given = above.clone()
    for found, plain in zip(gradients(above, gate, up), (of_gate, of_up), strict=True):
        torch.testing.assert_close(found.float(), plain, **close)
    assert torch.equal(above, given)
    over = gradients(above, gate, up, over=True)
    assert over[0] is above
    for found, plain in zip(over, (of_gate, of_up), strict=True):
        torch.testing.assert_close(found.float(), plain, **close)
    assert torch.equal(gate, kept)
