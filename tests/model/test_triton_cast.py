"""Casts by our kernel, scaled or not, on a GPU or in Triton's interpreter."""

import pytest
import torch

from tests.triton_device import INTERPRETED, triton_device

DEVICE = triton_device()

from trainwright.model.kernels.triton_cast import cast  # noqa: E402


@pytest.mark.parametrize("shape", [(1,), (3, 700), (2, 4, 1024)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_stay(shape, dtype):
    narrow = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    wide = cast(narrow, torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide, narrow.float())


@pytest.mark.parametrize("shape", [(1,), (3, 700), (2, 1024)])
def test_scaled_is_a_product_rounded_once(shape):
    total = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = cast(total, torch.bfloat16, torch.tensor(0.3, device=DEVICE))
    assert found.dtype == torch.bfloat16
    # The interpreter cuts bf16 off where the compiler rounds.
    torch.testing.assert_close(found.float(), total * 0.3, rtol=2**-7 if INTERPRETED else 2**-8, atol=0.0)
