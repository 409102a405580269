"""What the package flash-attn-4 offers, for CPU tensors: its two functions, written out."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.model import varlen_on_cpu as documents


def install(monkeypatch: Any, error: float = 0.0) -> None:
    """Lets `import flash_attn.cute.interface` find them. error: what the gradients of v are wrong by, as a share."""

    def backward(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _backward(*args, **options)
        return dq, dk, dv * (1 + error)

    interface: Any = ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd, interface._flash_attn_bwd = _forward, backward
    for name, module in (
        ("flash_attn", ModuleType("flash_attn")),
        ("flash_attn.cute", ModuleType("flash_attn.cute")),
        ("flash_attn.cute.interface", interface),
    ):
        monkeypatch.setitem(sys.modules, name, module)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, return_lse: bool, **rule: Any
) -> tuple[Tensor, Tensor, None, None, None]:
    assert return_lse
    offsets, window = _rule(q, k, rule)
    flat = (x.flatten(0, -3) for x in (q, k, v))
    out, lse, *_ = documents._forward(*flat, *offsets, scale=softmax_scale, **window)
    lse = lse if q.ndim == 3 else lse.unflatten(1, q.shape[:2]).transpose(0, 1)
    return out.view(q.shape), lse.contiguous(), None, None, None


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, lse: Tensor, *, softmax_scale: float, **rule: Any
) -> tuple[Tensor, Tensor, Tensor]:
    assert grad.is_contiguous()
    for kept, again in zip(
        (out, lse), _forward(q, k, v, softmax_scale=softmax_scale, return_lse=True, **rule), strict=False
    ):
        torch.testing.assert_close(kept, again)
    offsets, window = _rule(q, k, rule)
    flat = (x.flatten(0, -3) for x in (grad, q, k, v, out))
    found = documents._backward(*flat, lse, *offsets, scale=softmax_scale, **window)
    dq, dk, dv = (x.view(given.shape) for x, given in zip(found, (q, k, v), strict=True))
    return dq, dk, dv


def _rule(q: Tensor, k: Tensor, rule: dict[str, Any]) -> tuple[tuple[Tensor, Tensor], dict[str, int | None]]:
    """((offsets of queries, of keys), window) from what both functions are told."""
    assert rule["causal"]
    left = rule["window_size_left"]
    assert left is None or rule["window_size_right"] == 0
    if q.ndim == 3:
        offsets = rule["cu_seqlens_q"], rule["cu_seqlens_k"]
        assert rule["max_seqlen_q"] >= int(offsets[0].diff().max())
        assert rule["max_seqlen_k"] >= int(offsets[1].diff().max())
    else:
        offsets = tuple(torch.arange(len(x) + 1) * x.shape[1] for x in (q, k))
    return offsets, {"window_size_left": left, "window_size_right": 0}
