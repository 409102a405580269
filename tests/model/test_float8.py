"""Linear layers with 8-bit products against wide ones, forward and backward, and what they refuse or leave alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from trainwright.model.config import LinearConfig
from trainwright.model.kernels.float8 import Scaling, fits, float8_linear, rounded
from trainwright.model.linear import Linear, build_linear

SCALINGS: list[Scaling] = ["tensorwise", "rowwise"]


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(2, 32, 64, generator=source)
    weight = torch.randn(48, 64, generator=source) * 0.02
    pull = torch.randn(2, 32, 48, generator=source) * 1e-4
    return x.requires_grad_(), weight.requires_grad_(), pull


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_result_and_gradients(scaling: Scaling) -> None:
    """Rounding to 3 bits of mantissa is 2^-4 / sqrt(3) at worst, about 2.6% on average, an operand; e5m2 twice that."""
    x, weight, pull = operands()
    out = float8_linear(x, weight, scaling)
    ours = out.detach(), *torch.autograd.grad(out, (x, weight), pull)
    plain = x @ weight.t()
    theirs = plain.detach(), *torch.autograd.grad(plain, (x, weight), pull)
    for name, a, b in zip(("out", "x", "weight"), ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert 1e-3 < apart(a, b) < (0.08 if scaling == "tensorwise" else 0.05), name


def test_one_row_out_of_scale_costs_tensorwise_and_not_rowwise() -> None:
    x, weight, _ = operands()
    large = x.detach().clone()
    large[0, 0] *= 1e5
    rest = (large @ weight.t()).flatten(0, 1)[1:]
    by_tensor, by_row = (float8_linear(large, weight, scaling).flatten(0, 1)[1:] for scaling in SCALINGS)
    assert apart(by_tensor, rest) > 0.2
    assert apart(by_row, rest) < 0.05


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_rounding_keeps_the_largest_and_zeros(dim: int | None) -> None:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    small, scale = rounded(x, torch.float8_e4m3fn, dim)
    assert apart(small.float() * scale, x) < 0.04
    torch.testing.assert_close((small.float() * scale).abs().amax(), x.abs().amax())
    nothing, scale = rounded(torch.zeros(8, 16), torch.float8_e4m3fn, dim)
    assert not (nothing.float() * scale).any()


def test_sizes_that_do_not_fit_and_evaluation_stay_wide() -> None:
    layer = build_linear(LinearConfig(64, 48))
    assert isinstance(layer, Linear)
    layer.float8 = "tensorwise"
    x = torch.randn(1, 16, 64)
    assert not fits(x[:, :15], layer.weight)
    wide = torch.nn.functional.linear(x, layer.weight)
    assert not torch.equal(layer(x), wide)
    torch.testing.assert_close(layer(x[:, :15]), wide[:, :15])
    torch.testing.assert_close(layer.eval()(x), wide)


def test_a_frozen_weight_gets_no_gradient_and_an_input_without_need_none() -> None:
    x, weight, pull = operands()
    out = float8_linear(x, weight.detach(), "tensorwise")
    out.backward(pull)
    assert x.grad is not None
    float8_linear(x.detach(), weight, "rowwise").backward(pull)
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_compiled(scaling: Scaling, dtype: torch.dtype) -> None:
    x, weight, pull = (tensor.detach().to(dtype) for tensor in operands())

    def gradients(call: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        return torch.autograd.grad(call(leaves[0] * 2, leaves[1], scaling), leaves, pull)

    compiled = torch.compile(float8_linear, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(gradients(compiled), gradients(float8_linear), strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs)
