"""AdamW's Triton kernel against torch's: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch

from tests.triton_device import INTERPRETED, triton_device
from trainwright.train.adamw import AdamW

DEVICE = triton_device()
SHAPES = [(64, 256), (3, 5, 7), (5000,), (1,)]


@pytest.mark.parametrize("guard", [None, 0.0, 1.0])
@pytest.mark.parametrize(("weights", "grads"), [("float32", "float32"), ("bfloat16", "bfloat16")])
def test_kernel_is_torchs_update(monkeypatch, weights, grads, guard):
    """Several steps over two groups; a refused step changes nothing, not even the count."""
    monkeypatch.setattr(AdamW, "_is_ours", lambda _: True)
    generator = torch.Generator().manual_seed(0)

    def draw(shape, dtype):
        return torch.randn(shape, generator=generator).to(DEVICE, getattr(torch, dtype))

    plain = [draw(shape, weights) for shape in SHAPES]
    mine = [weight.clone() for weight in plain]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True}
    both = [
        kind([{"params": some[:2], "weight_decay": 0.1}, {"params": some[2:], "weight_decay": 0.0}], **settings)
        for kind, some in ((torch.optim.AdamW, plain), (AdamW, mine))
    ]
    before = [weight.clone() for weight in mine]
    for _ in range(3):
        for one, other in zip(plain, mine, strict=True):
            one.grad = draw(one.shape, grads)
            other.grad = one.grad.clone()
        for optimizer in both:
            if guard is not None:
                optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)
                optimizer.found_inf = torch.tensor(guard, device=DEVICE)
            optimizer.step()
    # The interpreter cuts bf16 off where the compiler rounds, moments too.
    bound = 1e-5 if weights == "float32" else 0.1 if INTERPRETED else 2**-6
    for one, other, old in zip(plain, mine, before, strict=True):
        torch.testing.assert_close(other, one, atol=bound, rtol=bound)
        assert torch.equal(other, old) == (guard == 1.0)
        ours, theirs = both[1].state[other], both[0].state[one]
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], atol=bound, rtol=bound)
