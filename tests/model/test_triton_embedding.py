"""The gradient of a table's lookup against torch's: on a GPU, or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from tests.triton_device import INTERPRETED, triton_device

DEVICE = triton_device()

from trainwright.model.kernels.triton_embedding import gradient  # noqa: E402


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("width", [1, 70, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_torchs(dtype, width, padding_idx):
    """Repeated ids, one 40 times and one 16 times (whole pieces), the table's first and last row."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.full((40,), 5), torch.full((16,), 7), torch.randint(0, 11, (30,), generator=draw)])
    ids = torch.cat([ids, torch.tensor([0, 11, 3])])[torch.randperm(89, generator=draw)].to(DEVICE)
    grad = torch.randn(89, width, generator=draw).to(DEVICE, dtype)
    table = torch.zeros(12, width, device=DEVICE, requires_grad=True)
    (expected,) = torch.autograd.grad(F.embedding(ids, table, padding_idx), table, grad.float())
    found = gradient(ids, grad, 12, padding_idx)
    assert found.dtype == dtype
    # The interpreter cuts bf16 off where the compiler rounds.
    bound = 1e-5 if dtype == torch.float32 else 2**-7 if INTERPRETED else 2**-8
    torch.testing.assert_close(found.float(), expected, rtol=bound, atol=1e-5)


def test_nothing_was_read():
    empty = torch.empty(0, dtype=torch.long, device=DEVICE)
    assert not gradient(empty, torch.empty(0, 8, device=DEVICE), 4, None).any()
