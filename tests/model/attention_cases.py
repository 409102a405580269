"""Attention problems that every backend must solve alike: shapes with grouped heads, masks, ALiBi."""

from __future__ import annotations

import torch
from torch import Tensor

from trainwright.model.config import MaskConfig
from trainwright.model.kernels.attention import Backend, attention, choose, prepare
from trainwright.model.mask import AttentionMask, Visibility
from trainwright.model.position import alibi_slopes

CASES = [(2, 17, 4, 2), (1, 33, 6, 6), (2, 16, 4, 1)]
"""Rows, positions, query heads, key-value heads."""
MASKS = ["causal", "window", "documents", "prefix", "prefix and documents"]


def visibility(rows: int, length: int, mask: str, device: torch.device) -> AttentionMask:
    documents = prefix = None
    if "documents" in mask:
        documents = torch.arange(length, device=device)[None].expand(rows, -1) // (length // 3 + 1)
        documents = torch.where(torch.arange(length, device=device) < length - 2, documents, -1).int()
    if "prefix" in mask:
        prefix = (torch.arange(length, device=device)[None] % (length // 3 + 1)) < 3
        prefix = prefix.expand(rows, -1).contiguous()
    config = MaskConfig("prefix" if prefix is not None else "causal", window=5 if mask == "window" else None)
    return AttentionMask.of(Visibility(length, length, documents, prefix), config)


def run(
    case: tuple[int, int, int, int],
    mask: str,
    alibi: bool,
    backend: Backend,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 16,
    chosen: list[str] | None = None,
) -> list[Tensor]:
    """[output, gradients of q, k, v] of one problem with a backend; `chosen` is told which one it came to."""
    rows, length, heads, kv = case
    random = torch.Generator().manual_seed(0)
    q = torch.randn(rows, length, heads, head_dim, generator=random).to(device, dtype).requires_grad_()
    k = torch.randn(rows, length, kv, head_dim, generator=random).to(device, dtype).requires_grad_()
    v = torch.randn(rows, length, kv, head_dim, generator=random).to(device, dtype).requires_grad_()
    upstream = torch.randn(rows, length, heads, head_dim, generator=random).to(device, dtype)
    where = q.device
    slopes = alibi_slopes(heads).to(where) if alibi else None
    seen = visibility(rows, length, mask, where)
    taken = choose(seen, device=where, dtype=dtype, alibi=alibi, wanted=backend)
    if chosen is not None:
        chosen.append(taken)
    ready = prepare(seen, taken, device=where, dtype=dtype, slopes_N=slopes)
    out = attention(q, k, v, ready, scale=head_dim**-0.5, slopes_N=slopes, backend=backend)
    out.backward(upstream)
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is not None
    return [out.detach(), q.grad, k.grad, v.grad]
