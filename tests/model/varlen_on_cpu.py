"""What torch's variable-length attention calls on a GPU, for CPU tensors: the same operators, written out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import Library


@contextmanager
def varlen_on_cpu(error: float = 0.0) -> Iterator[None]:
    """Inside, `varlen_attn` takes CPU tensors. `error`: what its gradients of v are wrong by, as a share."""
    library = Library("aten", "IMPL")
    try:
        register(library, error)
        yield
    finally:
        library._destroy()


def register(library: Library, error: float = 0.0) -> None:
    """Puts the kernels into a library, which takes them away when it goes."""

    def backward(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _backward(*args, **options)
        return dq, dk, dv * (1 + error)

    library.impl("_flash_attention_forward", _forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")


def _documents(
    q: Tensor, k: Tensor, v: Tensor, of_queries: Tensor, of_keys: Tensor, scale: float, left: int | None
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor, Tensor]]:
    """Each document's queries and keys, [heads, length, D] in float32, with its masked scores. Last meets last."""
    groups = q.shape[1] // k.shape[1]
    queries, keys = of_queries.tolist(), of_keys.tolist()
    for i in range(len(keys) - 1):
        own, seen = slice(*queries[i : i + 2]), slice(*keys[i : i + 2])
        Q, K, V = (x.float().transpose(0, 1) for x in (q[own], k[seen], v[seen]))
        K, V = K.repeat_interleave(groups, 0), V.repeat_interleave(groups, 0)
        at = torch.arange(Q.shape[1])[:, None] + K.shape[1] - Q.shape[1]
        key = torch.arange(K.shape[1])
        visible = (key <= at) & (key >= at - left if left is not None and left >= 0 else True)
        yield own, seen, Q, K, V, (Q @ K.transpose(1, 2) * scale).masked_fill(~visible, float("-inf"))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, of_queries: Tensor, of_keys: Tensor, *_: Any,
    scale: float, window_size_left: int | None = None, window_size_right: int | None = None, **__: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert window_size_right == 0  # causal
    outs, sums = [], []
    for _, _, _, _, V, scores in _documents(q, k, v, of_queries, of_keys, scale, window_size_left):
        outs.append((scores.softmax(-1) @ V).transpose(0, 1))
        sums.append(scores.logsumexp(-1))
    nothing = torch.zeros(2, dtype=torch.uint64)
    return torch.cat(outs).to(q.dtype), torch.cat(sums, 1), nothing, nothing, torch.empty(0)


def _backward(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, of_queries: Tensor, of_keys: Tensor,
    *_: Any, scale: float, window_size_left: int | None = None, **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    for own, seen, Q, K, V, scores in _documents(q, k, v, of_queries, of_keys, scale, window_size_left):
        P, G = scores.softmax(-1), upstream[own].float().transpose(0, 1)
        dP = G @ V.transpose(1, 2)
        dS = P * (dP - (dP * P).sum(-1, keepdim=True)) * scale
        dq[own] = (dS @ K).transpose(0, 1).to(q.dtype)
        for place, grad in ((dk, dS.transpose(1, 2) @ Q), (dv, P.transpose(1, 2) @ G)):
            place[seen] = grad.transpose(0, 1).unflatten(1, (-1, groups)).sum(2).to(q.dtype)
    return dq, dk, dv
