"""The Triton kernel against the plain arithmetic: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

from trainwright.train.adamw8bit import _new_state, _update_plain, decompress

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


@pytest.mark.parametrize("shape", [(64, 256), (30, 300), (4, 20, 70)])
@pytest.mark.parametrize("guard", [None, 0.0, 1.0])
def test_kernel_is_the_plain_arithmetic(shape, guard):
    from trainwright.train.triton_adamw8bit import update

    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(DEVICE)]
    weights.append(weights[0].clone())
    states = [_new_state(weight) for weight in weights]
    settings = (1e-2, 0.9, 0.95, 1e-8, 0.1)
    found = None if guard is None else torch.tensor(guard, device=DEVICE)
    scale = None if guard is None else torch.tensor(4.0, device=DEVICE)
    for step in range(1, 4):
        grad = torch.randn(shape, generator=generator).to(DEVICE)
        for weight, state, change in zip(weights, states, (_update_plain, update), strict=True):
            state["step"].fill_(step)
            change(weight, grad, state, settings, scale, found)
    torch.testing.assert_close(weights[0], weights[1], atol=1e-4, rtol=1e-4)
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        one, other = (decompress(state[key], state[f"{key}_scale"], signed) for state in states)
        torch.testing.assert_close(one, other, atol=0.02 * one.abs().max().item() + 1e-12, rtol=0)
        torch.testing.assert_close(states[0][f"{key}_scale"], states[1][f"{key}_scale"])
