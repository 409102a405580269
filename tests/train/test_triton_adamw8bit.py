"""The Triton kernel against the plain arithmetic: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch

from tests.triton_device import triton_device
from trainwright.train.adamw8bit import _new_state, _update_plain, borders, code, decompress

DEVICE = triton_device()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from trainwright.train.triton_adamw8bit import _code, _value, update  # noqa: E402

SHAPES = [(64, 256), (30, 300), (4, 20, 70), (5000,), (500, 64), (700, 8)]


@pytest.mark.parametrize("guard", [None, 0.0, 1.0])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_kernel_is_the_plain_arithmetic(weights, guard):
    """Parameters of several shapes at once, one with a gradient that is not contiguous, one of another type."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    plain = [draw(shape) for shape in SHAPES]
    plain[1] = plain[1].to(weights)
    mine = [weight.clone() for weight in plain]
    states = [[_new_state(weight) for weight in both] for both in (plain, mine)]
    settings = (1e-2, 0.9, 0.95, 1e-8, 0.1)
    found = None if guard is None else torch.tensor(guard, device=DEVICE)
    scale = None if guard is None else torch.tensor(4.0, device=DEVICE)
    for step in range(1, 4):
        grads = [draw(shape) for shape in SHAPES]
        grads[0] = draw((256, 64)).t()
        for state in states[0] + states[1]:
            state["step"].fill_(step)
        for weight, grad, state in zip(plain, grads, states[0], strict=True):
            _update_plain(weight, grad, state, settings, scale, found)
        update(list(zip(mine, grads, states[1], strict=True)), settings, scale, found)
    for one, other in zip(plain, mine, strict=True):
        # The interpreter cuts bf16 off where the compiler rounds: a step in the last bit for each of three updates.
        bound = 1e-4 if one.dtype == torch.float32 else 4 * 2**-8
        torch.testing.assert_close(one, other, atol=bound, rtol=2 * bound)
    for ours, theirs in zip(*states, strict=True):
        for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            one, other = (decompress(state[key], state[f"{key}_scale"], signed) for state in (ours, theirs))
            torch.testing.assert_close(one, other, atol=0.02 * one.abs().max().item() + 1e-12, rtol=0)
            torch.testing.assert_close(ours[f"{key}_scale"], theirs[f"{key}_scale"])


@triton.jit
def _both(shares, codes, numbers, found, SIGNED: tl.constexpr, SIZE: tl.constexpr):
    lane = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(found + lane, _code(tl.load(shares + lane), SIGNED))
    tl.store(numbers + lane, _value(tl.load(codes + lane), SIGNED))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_by_arithmetic_are_those_of_the_table(signed):
    """Every code's number to float32's last digits, and the nearest code of every share."""
    table, edges = code(signed, DEVICE), borders(signed, DEVICE)
    spread = 10 ** (8 * torch.rand(4096, generator=torch.Generator().manual_seed(0)).to(DEVICE) - 8)
    near = torch.cat([edges * (1 - 1e-5), edges * (1 + 1e-5), table, spread, spread.new_tensor([0.0, 1.0, 1e-30])])
    shares = torch.cat([near, -near]) if signed else near.clamp(min=0)
    shares = torch.cat([shares, shares.new_zeros(-len(shares) % 1024)]).clamp(-1, 1)
    codes = (torch.arange(len(shares), device=DEVICE) % 256).int()
    numbers, found = torch.empty_like(shares), torch.empty_like(codes)
    _both[(len(shares) // 1024,)](shares, codes, numbers, found, SIGNED=signed, SIZE=1024)
    torch.testing.assert_close(numbers, table[codes.long()], rtol=2e-6, atol=0)
    assert torch.equal(found, torch.bucketize(shares, edges, out_int32=True))
