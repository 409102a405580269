"""What only a GPU has, against plain float32: attention in each backend, grouped experts, cross entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.model.attention_cases import MASKS, run
from trainwright.model.kernels.cross_entropy import VocabShard, linear_cross_entropy, linear_cross_entropy_plain
from trainwright.model.kernels.grouped import grouped_linear, has_grouped_mm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(autouse=True)
def _few_shapes() -> None:
    """A run has few shapes; many tests in one process would pass torch's limit of recompilations and lose flex."""
    torch._dynamo.reset()


CASES = [(2, 384, 8, 2), (1, 300, 4, 4), (2, 24, 8, 2)]


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "flash", "sdpa"])
def test_attention(case: tuple[int, int, int, int], mask: str, alibi: bool, backend: Any) -> None:
    if backend == "sdpa" and alibi and "prefix" in mask:
        pytest.skip("a bf16 bias is coarse where keys lie ahead; no family has both, and flex is exact")
    options: dict[str, Any] = {"device": "cuda", "head_dim": 64}
    plain = run(case, mask, alibi, "eager", **options)
    rounded = run(case, mask, alibi, "eager", dtype=torch.bfloat16, **options)
    chosen: list[str] = []
    given = run(case, mask, alibi, backend, dtype=torch.bfloat16, chosen=chosen, **options)
    if backend == "auto":
        expected = {"window": "varlen", "documents": "varlen"}.get(mask, "cudnn" if mask == "causal" else "flex")
        expected = "flex" if alibi else expected
        assert chosen == ["sdpa" if expected == "flex" and case[1] < 256 else expected]
    for one, eager, two in zip(plain, rounded, given, strict=True):
        bound = 3 * (eager.float() - one).abs().max() + 2e-2  # the noise of bf16, measured by the plain form in bf16
        assert (two.float() - one).abs().max() < bound


@pytest.mark.parametrize("counts", [[5, 0, 123, 72], [1, 1, 1, 197], [200, 0, 0, 0]])
def test_grouped_linear(counts: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 96, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert has_grouped_mm(x)
    upstream = torch.randn(200, 96, device="cuda", dtype=torch.bfloat16)
    given = grouped_linear(x, weight, torch.tensor(counts, device="cuda"))
    ours = (given, *torch.autograd.grad(given, (x, weight), upstream))
    parts = x.float().split(counts)
    expected = torch.cat([part @ w.float().t() for part, w in zip(parts, weight, strict=True)])
    plain = (expected, *torch.autograd.grad(expected, (x, weight), upstream.float()))
    for one, two in zip(ours, plain, strict=True):
        assert (one.float() - two.float()).abs().max() / two.float().abs().max() < 1e-2


def test_slices_of_a_vocabulary_are_the_whole() -> None:
    """Sums of two slices together, and each slice's gradient by them."""
    from trainwright.model.kernels import triton_cross_entropy

    torch.manual_seed(0)
    logits, labels = torch.randn(300, 50001, device="cuda") * 3, torch.randint(0, 50001, (300,), device="cuda")
    expected, loss = triton_cross_entropy.softmax_gradient(logits, labels, torch.float32)
    cuts, parts = (slice(0, 20001), slice(20001, 50001)), []
    for cut in cuts:
        inside = (labels >= cut.start) & (labels < cut.stop)
        parts.append((logits[:, cut].contiguous(), torch.where(inside, labels - cut.start, -1)))
    sums = torch.stack([triton_cross_entropy.slice_sums(*part) for part in parts])
    whole = (sums[:, 0] + sums[:, 1].log()).logsumexp(0)
    found = torch.cat([triton_cross_entropy.slice_gradient(*part, whole, torch.float32) for part in parts], 1)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert torch.allclose(whole - sums[:, 2].sum(0), loss, rtol=1e-5)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("chunk", [0, 300])
@pytest.mark.parametrize("vocab", [50000, 50257])
def test_cross_entropy(vocab: int, chunk: int, split: bool) -> None:
    """In chunks the head's gradient is a sum that one product after the other is added to, in place. Rows of an odd
    vocabulary stand further apart than they are long."""
    torch.manual_seed(0)
    x = torch.randn(2, 700, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocab, 256, device="cuda") * 0.1).bfloat16().requires_grad_()
    labels = torch.randint(0, vocab, (2, 700), device="cuda")
    labels[:, ::3] = -100
    alone = VocabShard(0, vocab, reduce_max=lambda _: None, reduce_sum=lambda _: None) if split else None
    given = linear_cross_entropy(x, weight, labels, shard=alone, chunk=chunk)
    ours = torch.autograd.grad(given, (x, weight))
    wide_x, wide_w = x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    expected = linear_cross_entropy_plain(wide_x, wide_w, labels)
    plain = torch.autograd.grad(expected, (wide_x, wide_w))
    assert abs(given.item() / expected.item() - 1) < 1e-5
    for one, two in zip(ours, plain, strict=True):
        assert (one.float() - two).abs().max() / two.abs().max() < 1e-2
