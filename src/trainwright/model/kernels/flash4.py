"""FlashAttention-4 (`flash-attn-4`, Dao-AILab) for Hopper and Blackwell: causal rows, packed documents, windows.

The package compiles its kernels with CuTe DSL when they are first called. Its functions are private to its own
autograd function, which torch.compile cannot see through; here they stand behind two operations of ours, opaque to the
compiler. torch's own switch for it (`activate_flash_attention_impl`) fails in 2.11's backward pass of packed rows.

Owns the operations and whether they are in use: `flash.py` tries them against the formula first.
"""

# No `from __future__ import annotations`: torch reads the operations' schemas from these annotations.
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

WIDEST = 128
"""Head width up to which it was measured against cuDNN and flash attention 2; wider heads stay with those."""
_functions: list[Callable[..., tuple[Any, ...]]] = []
"""Its forward and backward pass while it is in use, else empty."""


def load() -> None:
    """Puts it in use. Raises ImportError where it is not installed."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # else every start compiles for seconds
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    _functions[:] = [_flash_attn_fwd, _flash_attn_bwd]


def unload() -> None:
    _functions.clear()


def in_use() -> bool:
    """Not where repeats have to be bit for bit: its backward pass adds up in any order."""
    return bool(_functions) and not torch.are_deterministic_algorithms_enabled()


def takes(q: Tensor) -> bool:
    return in_use() and q.shape[-1] <= WIDEST and q.shape[-1] % 8 == 0


def _rule(
    of_queries: Tensor | None, of_keys: Tensor | None, most_queries: int, most_keys: int, window: int | None
) -> dict[str, Any]:
    """What both passes are told alike."""
    rule: dict[str, Any] = {"causal": True, "window_size_left": None if window is None else window - 1}
    if window is not None:
        rule["window_size_right"] = 0
    if of_queries is not None:
        rule |= {"cu_seqlens_q": of_queries, "cu_seqlens_k": of_keys}
        rule |= {"max_seqlen_q": most_queries, "max_seqlen_k": most_keys}
    return rule


@custom_op("trainwright::flash4", mutates_args=())
def flash4_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    of_queries: Tensor | None,
    of_keys: Tensor | None,
    most_queries: int,
    most_keys: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Rows [B, S, N, D], or documents [T, N, D] between the offsets; (result, log of the sum of exponentials)."""
    rule = _rule(of_queries, of_keys, most_queries, most_keys, window)
    out, lse, *_ = _functions[0](q, k, v, softmax_scale=scale, return_lse=True, **rule)
    return out, lse


@flash4_op.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    heads_last = q.shape[:-1]
    shape = (*heads_last[:-2], heads_last[-1], heads_last[-2])  # [B, N, S] or [N, T]
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@custom_op("trainwright::flash4_backward", mutates_args=())
def flash4_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    of_queries: Tensor | None,
    of_keys: Tensor | None,
    most_queries: int,
    most_keys: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rule = _rule(of_queries, of_keys, most_queries, most_keys, window)
    dq, dk, dv, *_ = _functions[1](q, k, v, out, grad.contiguous(), lse, softmax_scale=scale, **rule)
    return dq, dk, dv


@flash4_backward_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, of_queries, of_keys, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, of_queries, of_keys)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    return *flash4_backward_op(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 6


flash4_op.register_autograd(_gradients, setup_context=_keep)


def rows(q_BSND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, scale: float) -> Tensor:
    """Causal attention of whole rows, [B, S, N, D]."""
    length = q_BSND.shape[1]
    return flash4_op(q_BSND, k_BSKD, v_BSKD, None, None, length, length, scale, None)[0]


def documents(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, offsets: tuple[Tensor, Tensor], longest: tuple[int, int],
    scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """Causal attention inside documents, [T, N, D]. offsets, longest: of queries and of keys; window: keys seen."""
    return flash4_op(q_TND, k_TKD, v_TKD, *offsets, *longest, scale, window)[0]
