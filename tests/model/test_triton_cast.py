"""16 bits to float32 by our kernel: the same numbers, on a GPU or in Triton's interpreter."""

import pytest
import torch

from tests.triton_device import triton_device

DEVICE = triton_device()

from trainwright.model.kernels.triton_cast import widen  # noqa: E402


@pytest.mark.parametrize("shape", [(1,), (3, 700), (2, 4, 1024)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_stay(shape, dtype):
    narrow = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    wide = widen(narrow)
    assert wide.dtype == torch.float32
    assert torch.equal(wide, narrow.float())
