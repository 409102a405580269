"""The kernel that adds a gradient to a float32 sum, against `+=`: on a GPU, or in Triton's interpreter."""

import pytest
import torch

from tests.triton_device import triton_device

DEVICE = triton_device()

from trainwright.parallel.triton_accumulate import add  # noqa: E402


@pytest.mark.parametrize("shape", [(1,), (3, 700), (2, 1024)])
def test_sums_are_those_of_plain_addition(shape):
    draw = torch.Generator().manual_seed(0)
    total = torch.randn(shape, generator=draw).to(DEVICE)
    grad = torch.randn(shape, generator=draw).to(DEVICE, torch.bfloat16)
    expected = total + grad.float()
    add(total, grad)
    assert torch.equal(total, expected)
