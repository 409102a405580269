"""Attention: softmax(q k^T scale + bias) v with one signature and several backends.

Owns the choice of a backend from mask, dtype and device. Backends:
    eager    written out, softmax in float32: the reference
    sdpa     torch's scaled_dot_product_attention, its own choice of kernel; a dense mask where one is needed
    cudnn    the same, cuDNN's kernel first (on Hopper almost twice flash attention 2)
    flash    FlashAttention-4 where it is in use, else the same, flash attention first
    varlen   packed documents and windows without any mask tensor: FlashAttention-4, else torch.nn.attention.varlen
    flex     torch.nn.attention.flex_attention, compiled: ALiBi, prefixes and their mixtures without a dense bias
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from inspect import signature
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from trainwright.model.kernels import flash4
from trainwright.model.mask import AttentionMask, document_offsets

Backend = Literal["auto", "eager", "sdpa", "cudnn", "flash", "varlen", "flex"]

_KERNELS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
_VARLEN_NAMES_GQA = "enable_gqa" in signature(varlen_attn).parameters
"""Torch 2.11's reads the head counts from the tensors, without being told."""
_FLEX_FROM = 256
"""Shorter rows are cheaper with a dense mask than with a block mask."""


def choose(mask: AttentionMask, *, device: torch.device, dtype: torch.dtype, alibi: bool, wanted: Backend) -> Backend:
    """The backend for one layer kind in this pass: `wanted` where it can do the mask, else the nearest that can."""
    if wanted == "eager" or device.type != "cuda" or not dtype.is_floating_point or dtype.itemsize != 2:
        return "eager" if wanted == "eager" else "sdpa"
    if wanted == "sdpa":
        return "sdpa"
    if mask.seen.query_cu_seqlens is not None and not alibi:
        return "varlen"
    if mask.causal_only and not alibi:
        return "flash" if wanted == "flash" or (wanted == "auto" and flash4.in_use()) else "cudnn"
    whole = mask.seen.num_queries == mask.seen.num_keys
    if whole and not alibi and mask.seen.prefix_BT is None:
        return "varlen"
    return "flex" if whole and mask.seen.num_keys >= _FLEX_FROM else "sdpa"


def prepare(
    mask: AttentionMask, backend: Backend, *, device: torch.device, dtype: torch.dtype, slopes_N: Tensor | None
) -> AttentionMask:
    """Makes once what every layer of the pass would make again: dense mask or bias, offsets, block mask."""
    if backend in ("eager", "sdpa", "cudnn", "flash"):
        if slopes_N is not None:
            return replace(mask, bias_BNST=alibi_bias(slopes_N, mask.dense(device), dtype))
        one = mask.seen.num_queries in (1, mask.seen.num_keys)
        return mask if mask.causal_only and one else replace(mask, allowed_BNST=mask.dense(device))
    if backend == "varlen" and mask.seen.cu_seqlens is None and mask.seen.document_ids_BT is not None:
        seen = replace(mask.seen, cu_seqlens=document_offsets(mask.seen.document_ids_BT))
        return replace(mask, seen=seen)
    return replace(mask, block=_block_mask(mask, device)) if backend == "flex" else mask


def attention(
    q_BSND: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    slopes_N: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """[B, S, N, D], in q's dtype. Queries are the last S of the T keys; N is a multiple of K.

    `slopes_N`: ALiBi, slope x (key - query) added to the scaled scores.
    """
    alibi = slopes_N is not None
    chosen = choose(mask, device=q_BSND.device, dtype=q_BSND.dtype, alibi=alibi, wanted=backend)
    if chosen == "varlen":
        return varlen(q_BSND, k_BTKD, v_BTKD, mask, scale)
    if chosen == "flash" and q_BSND.shape[1] == k_BTKD.shape[1] and flash4.takes(q_BSND):
        return flash4.rows(q_BSND, k_BTKD, v_BTKD, scale)
    q, k, v = (x.transpose(1, 2) for x in (q_BSND, k_BTKD, v_BTKD))
    if chosen == "flex":
        return _flex(q, k, v, mask, scale, slopes_N).transpose(1, 2)
    if chosen == "eager":
        return _eager(q, k, v, mask, scale, slopes_N).transpose(1, 2)
    bias, causal = _bias(q, k, mask, slopes_N)
    grouped = q.shape[1] != k.shape[1]

    def call() -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=grouped
        )

    if chosen == "sdpa":
        return call().transpose(1, 2)
    with sdpa_kernel(_KERNELS["flash" if backend == "flash" else "cudnn"], set_priority=True):
        return call().transpose(1, 2)


def _bias(q_BNSD: Tensor, k_BKTD: Tensor, mask: AttentionMask, slopes_N: Tensor | None) -> tuple[Tensor | None, bool]:
    """What SDPA is given: (bool mask or additive bias or None, is_causal)."""
    S, T = q_BNSD.shape[2], k_BKTD.shape[2]
    if mask.causal_only and slopes_N is None:
        if S == 1 or S == T:
            return None, S > 1
        return mask.dense(q_BNSD.device), False
    if slopes_N is None:
        return mask.dense(q_BNSD.device), False
    ready = mask.bias_BNST
    if ready is not None and ready.shape[1] == slopes_N.numel():
        return ready, False
    return alibi_bias(slopes_N, mask.dense(q_BNSD.device), q_BNSD.dtype), False


def alibi_bias(slopes_N: Tensor, allowed_BNST: Tensor, dtype: torch.dtype) -> Tensor:
    """[B or 1, N, S, T]: slope x (key - query), minus infinity where hidden.

    Float32, because in half precision far distances move in steps (at 300 and a slope of 0.7 bf16 steps are 1); but
    CUDA's kernels take the queries' type only. There flex computes long rows, exactly.
    """
    S, T = allowed_BNST.shape[-2:]
    device = allowed_BNST.device
    distance_ST = torch.arange(T, device=device) - torch.arange(T - S, T, device=device)[:, None]
    bias_NST = slopes_N.float()[:, None, None] * distance_ST
    bias_BNST = torch.where(allowed_BNST, bias_NST, float("-inf"))
    return bias_BNST.to(dtype) if device.type == "cuda" else bias_BNST


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, slopes_N: Tensor | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * scale
    allowed = mask.dense(q.device)
    if slopes_N is not None:
        scores = scores + alibi_bias(slopes_N, allowed, torch.float32)
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1).to(v.dtype) @ v


def varlen(q_BSND: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    B, S = q_BSND.shape[:2]
    offsets, longest = mask.seen.cu_seqlens, mask.seen.max_seqlen or k_BTKD.shape[1]
    if offsets is None and mask.seen.document_ids_BT is not None:
        offsets = document_offsets(mask.seen.document_ids_BT)
    if offsets is None:  # a window over whole rows
        offsets = torch.arange(0, (B + 1) * S, S, dtype=torch.int32, device=q_BSND.device)
    q, k, v = (x.flatten(0, 1) for x in (q_BSND, k_BTKD, v_BTKD))
    of_queries = mask.seen.query_cu_seqlens
    of_queries = offsets if of_queries is None else of_queries
    most_queries = min(longest, S)
    # A document's last query is its last key's: these kernels align a causal mask there.
    if flash4.takes(q):
        both, most = (of_queries, offsets), (most_queries, longest)
        return flash4.documents(q, k, v, both, most, scale, mask.window).unflatten(0, (B, S))
    left = -1 if mask.window is None else mask.window - 1
    rule: dict[str, Any] = {"scale": scale, "window_size": (left, 0)}
    if _VARLEN_NAMES_GQA:
        rule["enable_gqa"] = q.shape[1] != k.shape[1]
    out: Any = varlen_attn(q, k, v, of_queries, offsets, most_queries, longest, **rule)
    return out.unflatten(0, (B, S))


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _compiled_block_mask() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask, dynamic=False)


def _block_mask(mask: AttentionMask, device: torch.device) -> Any:
    """Which blocks of keys each block of queries needs, and the exact rule inside the partial ones."""
    seen, window = mask.seen, mask.window
    ids, prefix = seen.document_ids_BT, seen.prefix_BT

    def visible(b: Tensor, n: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = key <= query
        if window is not None:
            allowed = allowed & (key > query - window)
        if prefix is not None:
            allowed = allowed | prefix[b, key]
        return allowed & (ids[b, query] == ids[b, key]) if ids is not None else allowed

    rows = None if ids is None and prefix is None else (ids if ids is not None else prefix).shape[0]  # type: ignore[union-attr]
    return _compiled_block_mask()(visible, rows, None, seen.num_queries, seen.num_keys, device=device)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, slopes_N: Tensor | None) -> Tensor:
    def alibi(score: Tensor, b: Tensor, n: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + slopes_N[n] * (key - query)  # type: ignore[index]

    block = mask.block if mask.block is not None else _block_mask(mask, q.device)
    rule = alibi if slopes_N is not None else None
    return _compiled_flex()(q, k, v, score_mod=rule, block_mask=block, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def describe(device: torch.device) -> str:
    """What bf16 training takes on this device, in words."""
    if device.type != "cuda":
        return "sdpa"
    from trainwright.model.kernels.flash import activate

    newest = activate(device)
    plain = "flash" if flash4.in_use() else "cudnn"
    return f"{plain} (plain causal), varlen (packed documents, windows) by {newest}, flex (ALiBi, prefix)"
