"""What layouts ask of one GPU: attention of a part of the queries, activations in host memory, timed stages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.parallel import models
from trainwright.model.kernels import attention as kernel
from trainwright.model.mask import AttentionMask, Visibility
from trainwright.model.transformer import Transformer
from trainwright.parallel.offload import apply_offload
from trainwright.parallel.recompute import apply_recompute
from trainwright.parallel.sequence import _chunk_mask

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
GPU = torch.device("cuda")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    chosen = kernel.choose(mask, device=GPU, dtype=q.dtype, alibi=False, wanted="auto")
    mask = kernel.prepare(mask, chosen, device=GPU, dtype=q.dtype, slopes_N=None)
    return kernel.attention(q, k, v, mask, scale=q.shape[-1] ** -0.5)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("documents", [True, False])
def test_a_ring_of_chunks_is_attention_over_whole_rows(documents, window):
    """Outputs and gradients of queries in chunks against keys up to their ends, in bf16."""
    torch.manual_seed(0)
    length, chunks = 2048, 4
    ids = None
    if documents:
        ids = torch.tensor([[0] * 700 + [1] * 900 + [2] * 448, [0] * 2000 + [-1] * 48], dtype=torch.int32, device=GPU)
    shapes = ((2, length, 8, 64), (2, length, 2, 64), (2, length, 2, 64))
    q, k, v = (torch.randn(shape, device=GPU, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    whole = AttentionMask(Visibility(length, length, ids), window)
    expected = attend(q, k, v, whole)
    weight = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (q, k, v), weight)
    outs = []
    for chunk, part in enumerate(q.chunk(chunks, 1)):
        mask = _chunk_mask(whole, chunk, chunks, 2, GPU)
        outs.append(attend(part, k[:, : mask.seen.num_keys], v[:, : mask.seen.num_keys], mask))
    found = torch.cat(outs, 1)
    grads = torch.autograd.grad(found, (q, k, v), weight)
    for ours, theirs in zip((found, *grads), (expected, *expected_grads), strict=True):
        assert (ours - theirs).float().norm() / theirs.float().norm() < 0.01


def long_model(layers: int = 6) -> Transformer:
    config = models.llama(layers)
    with torch.device("meta"):
        model = Transformer(config)
    return model.to(torch.bfloat16).to_empty(device=GPU).init_weights(3).train()


def step(model: Transformer) -> tuple[dict[str, Tensor], int]:
    """Gradients, and the most memory that was allocated beyond the weights."""
    ids = torch.randint(0, 90, (4, 65536), device=GPU, generator=torch.Generator(GPU).manual_seed(1))
    model(ids, labels=ids).loss_sum.backward()  # kernels are found, memory is cached
    model.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(ids, labels=ids).loss_sum.backward()
    torch.cuda.synchronize()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, (
        torch.cuda.max_memory_allocated() - before
    )


@pytest.mark.parametrize("mode", ["none", "full"])
def test_offloaded_activations_leave_the_device_and_come_back(mode):
    plain = long_model()
    apply_recompute((plain.layers or {}).values(), mode)
    expected, most = step(plain)
    model = long_model()
    apply_recompute((model.layers or {}).values(), mode)
    host = apply_offload((model.layers or {}).values(), GPU)
    found, less = step(model)
    assert host.bytes > 0
    for name, grad in found.items():
        assert torch.allclose(grad, expected[name], rtol=2e-2, atol=1e-3 * float(expected[name].abs().max())), name
    assert less < most
