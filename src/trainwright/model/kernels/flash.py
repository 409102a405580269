"""Which flash attention computes: the one that torch carries, or a newer one that is installed.

FlashAttention-4 (`flash-attn-4`, Hopper and Blackwell) stands behind operations of ours (`flash4.py`), and takes plain
causal rows from cuDNN as well. FlashAttention-3 (Shah et al. 2024, package `flash_attn_interface`, Hopper) torch 2.11
and later puts behind its own operators (`torch.nn.attention.activate_flash_attention_impl`). The backends `varlen` and
`flash` are served by them; torch's own, generation 2, reaches about half of what Hopper can do. Owns the choice, once
in a process: the first that can be imported and whose numbers are right.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainwright.model.kernels import flash4
from trainwright.model.kernels.attention import attention, varlen
from trainwright.model.mask import AttentionMask, Visibility

GENERATIONS = ("FA4", "FA3")
"""In the order in which they are tried."""
SERVED = ("auto", "cudnn", "flash")
"""Wishes for attention (`model.attention`) whose packed rows it computes."""
TOLERANCE = 0.03
"""Of the largest number of a result: bf16 has three digits, and sums are taken in another order."""


@dataclass(frozen=True)
class Flash:
    """The generation that was activated, None for torch's own; why the others were not, one clause each."""

    name: str | None = None
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        why = f" ({'; '.join(self.refused)})" if self.refused else ""
        return (self.name or "FA2") + why


@cache
def activate(device: torch.device) -> Flash:
    """Puts the newest flash attention behind torch's operators, once. Nothing happens without CUDA."""
    return first_that_works(device) if device.type == "cuda" else Flash()


def first_that_works(device: torch.device, names: Iterable[str] = GENERATIONS) -> Flash:
    """Tries one after the other; what cannot be imported, does not run or gives other numbers is left out."""
    refused: list[str] = []
    for name in names:
        why = _refusal(name, device)
        if why is None:
            return Flash(name, tuple(refused))
        refused.append(f"{name}: {why}")
    return Flash(refused=tuple(refused))


def _refusal(name: str, device: torch.device) -> str | None:
    """Puts `name` in use and leaves it so where it works; else why not, with torch's own back in its place."""
    if name != "FA4" and name not in torch.nn.attention.list_flash_attention_impls():
        return "unknown to this torch"
    try:
        flash4.load() if name == "FA4" else torch.nn.attention.activate_flash_attention_impl(name)
    except Exception as error:  # not installed; or made for another torch or CUDA, which fails in its own ways
        return _first_line(error)
    try:
        wrong = _wrong(device)
    except Exception as error:  # a card or a case that it does not take
        wrong = _first_line(error)
    if wrong is not None:
        flash4.unload() if name == "FA4" else torch.nn.attention.restore_flash_attention_impl()
    return wrong


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def _wrong(device: torch.device) -> str | None:
    """What it computes otherwise than the formula written out, of all that training asks of it; None if nothing.

    Packed documents with a window and without, grouped heads, queries that are the last of their keys (a ring), in
    which one document has no query; whole rows. Forward and backward.
    """
    keys = torch.tensor([0, 1, 70, 135, 200], dtype=torch.int32, device=device)
    ids_BT = torch.repeat_interleave(torch.arange(4), keys.cpu().diff())[None].to(device)
    late = torch.tensor([0, 0, 0, 35, 100], dtype=torch.int32, device=device)  # the last 100 of the 200
    cases = {
        "documents": AttentionMask(Visibility(200, 200, ids_BT, cu_seqlens=keys)),
        "windows": AttentionMask(Visibility(200, 200, ids_BT, cu_seqlens=keys), window=20),
        "parts of rows": AttentionMask(Visibility(100, 200, ids_BT, cu_seqlens=keys, query_cu_seqlens=late)),
        "whole rows": AttentionMask(Visibility(200, 200)),
    }
    for what, mask in cases.items():
        for given, expected in zip(*_both(mask, device), strict=True):
            if not (given - expected).abs().max() <= TOLERANCE * expected.abs().max():
                return f"gives other numbers than the formula for {what}"
    return None


def _both(mask: AttentionMask, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """[output, gradients of q, k and v] in float32: of the kernel in bf16, and written out in float32."""
    random, scale = torch.Generator().manual_seed(0), 128**-0.5
    sizes = [(mask.seen.num_queries, 4), (mask.seen.num_keys, 2), (mask.seen.num_keys, 2), (mask.seen.num_queries, 4)]
    numbers = [torch.randn(1, *size, 128, generator=random).to(device, torch.bfloat16) for size in sizes]

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if mask.seen.document_ids_BT is not None:
            return varlen(q, k, v, mask, scale)
        if flash4.takes(q):
            return flash4.rows(q, k, v, scale)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask, scale=scale, backend="eager")

    results = []
    for run, dtype in ((kernel, torch.bfloat16), (plain, torch.float32)):
        q, k, v, upstream = (x.to(dtype) for x in numbers)
        with torch.enable_grad():
            inputs = [x.requires_grad_() for x in (q, k, v)]
            out = run(*inputs)
            grads = torch.autograd.grad(out, inputs, upstream)
        results.append([x.detach().float() for x in (out, *grads)])
    return results[0], results[1]
