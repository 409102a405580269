"""The Triton kernels against the plain arithmetic: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch

from tests.triton_device import INTERPRETED, triton_device
from trainwright.model.kernels import quantized

DEVICE = triton_device()


@pytest.fixture(scope="module")
def kernels():
    from trainwright.model.kernels import triton_quantized

    return triton_quantized


def weight(*shape):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(DEVICE)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 192), (5, 64), (2, 70, 128)])
def test_dequantize_is_the_plain_one(kernels, kind, double, dtype, shape):
    pieces = quantized.quantize(kind, weight(*shape), double=double)
    plain = quantized.dequantize_plain(kind, pieces, shape[-1], dtype)
    mine = kernels.dequantize(kind, pieces, shape[-1], dtype)
    # The compiler may fuse absmax's product and sum, and divide once more: the last bit.
    torch.testing.assert_close(mine, plain, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0)
    if not INTERPRETED:  # the interpreter cuts bf16 off where the compiler rounds
        assert (mine != plain).float().mean() < 0.01 or dtype == torch.float32


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("columns", [64, 4096, 5000])
def test_fp8_rows_are_the_plain_ones(kernels, scaled, columns):
    x = weight(9, columns).to(torch.bfloat16)
    factor = weight(columns).abs() + 0.5 if scaled else None
    codes, scale = kernels.to_fp8_rows(x, factor)
    wanted, wanted_scale = quantized._to_fp8(x.float() if factor is None else x.float() * factor)
    torch.testing.assert_close(scale, wanted_scale)
    difference = codes.float() - wanted.view(torch.float8_e4m3fn).float()
    assert (difference != 0).float().mean() < 0.05  # halves between two codes
    if not INTERPRETED:  # the interpreter forgets the carry where rounding reaches the next power of two
        assert (difference.abs() <= codes.float().abs() / 7 + 2**-9).all()  # one step


@pytest.mark.parametrize("shape", [(128, 128), (100, 300), (17, 5)])
def test_transpose(kernels, shape):
    x = torch.randint(0, 256, shape, dtype=torch.uint8).to(DEVICE)
    assert torch.equal(kernels.transpose_bytes(x), x.t())


@pytest.mark.skipif(INTERPRETED, reason="needs the matrix unit")
@pytest.mark.parametrize("rows", [16, 100])
def test_fp8_product_on_the_device_is_the_plain_one(rows):
    x, w = weight(rows, 256).to(torch.bfloat16) * 50, weight(512, 256)
    codes, scale = quantized.quantize("fp8", w)
    cpu = [codes.cpu(), scale.cpu()]
    torch.testing.assert_close(
        quantized.fp8_linear(x, codes, scale).cpu(), quantized.fp8_linear(x.cpu(), *cpu), rtol=0.02, atol=0.02
    )
    grad = weight(rows, 512).to(torch.bfloat16)
    mine = quantized.fp8_linear_backward(grad, codes, scale).cpu()
    torch.testing.assert_close(mine, quantized.fp8_linear_backward(grad.cpu(), *cpu), rtol=0.02, atol=0.005)
