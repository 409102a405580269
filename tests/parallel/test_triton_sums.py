"""Sums of gradients by our kernels, against plain additions: on a GPU, or in Triton's interpreter."""

import pytest
import torch

from tests.triton_device import triton_device

DEVICE = triton_device()

from trainwright.parallel.triton_sums import add, sum_parts  # noqa: E402


@pytest.mark.parametrize("shape", [(1,), (3, 700), (2, 1024)])
def test_sums_are_those_of_plain_addition(shape):
    draw = torch.Generator().manual_seed(0)
    total = torch.randn(shape, generator=draw).to(DEVICE)
    grad = torch.randn(shape, generator=draw).to(DEVICE, torch.bfloat16)
    expected = total + grad.float()
    add(total, grad)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("ranks", "rank"), [(2, 0), (2, 1), (4, 0), (4, 2), (4, 3)])
@pytest.mark.parametrize("count", [1, 700, 4096])
def test_parts_of_ranks_are_summed_in_their_order(ranks, rank, count, dtype):
    parts = torch.randn(ranks, count, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    expected = parts[0].float()
    for part in parts[1:]:
        expected = expected + part.float()
    total = torch.full((count,), float("nan"), device=DEVICE)
    sum_parts(parts[rank], parts[torch.arange(ranks) != rank].contiguous(), rank, total)
    assert torch.equal(total, expected)
