"""Who sees whom. Owns visibility: causal, window, documents, padding, prefix; and its dense form.

Key padding is a special case of documents: real tokens are one document, pads (-1) another, so a pad never meets a real
token and no query is left without a key (its softmax would be undefined).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trainwright.model.config import MaskConfig, PrefixConfig


@dataclass(frozen=True)
class Visibility:
    """The facts of one forward pass that all layers share. Queries are the last `num_queries` of the keys.

    `document_ids_BT`: equal ids see each other. `prefix_BT`: true where a key is in its document's prompt (GLM).
    `cu_seqlens`: offsets of the documents in the flattened batch, int32, for variable-length kernels.
    `query_cu_seqlens`: those of each document's queries in the flattened queries, where these are a part of the keys.
    """

    num_queries: int
    num_keys: int
    document_ids_BT: Tensor | None = None
    prefix_BT: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    query_cu_seqlens: Tensor | None = None


@dataclass(frozen=True)
class AttentionMask:
    """One layer kind's mask: the shared facts, its window, and the form that a kernel asked for, dense or in blocks."""

    seen: Visibility
    window: int | None = None
    allowed_BNST: Tensor | None = None
    bias_BNST: Tensor | None = None
    block: Any = None

    @classmethod
    def of(cls, seen: Visibility, config: MaskConfig) -> AttentionMask:
        if config.kind == "causal":
            seen = replace(seen, prefix_BT=None)
        window = config.window if config.window and config.window < seen.num_keys else None
        return cls(seen, window)

    @property
    def causal_only(self) -> bool:
        """Whether "key index <= query index" says everything."""
        return self.window is None and self.seen.document_ids_BT is None and self.seen.prefix_BT is None

    def dense(self, device: torch.device) -> Tensor:
        """[B or 1, 1, S, T] bool, true where the query sees the key. Every query sees itself."""
        if self.allowed_BNST is not None:
            return self.allowed_BNST
        seen = self.seen
        query_S1 = torch.arange(seen.num_keys - seen.num_queries, seen.num_keys, device=device)[:, None]
        key_T = torch.arange(seen.num_keys, device=device)
        allowed = (key_T <= query_S1)[None, None]
        if self.window is not None:
            allowed = allowed & (key_T > query_S1 - self.window)
        if seen.prefix_BT is not None:
            allowed = allowed | seen.prefix_BT[:, None, None, :]
        if seen.document_ids_BT is not None:
            query_ids = seen.document_ids_BT[:, seen.num_keys - seen.num_queries :]
            allowed = allowed & (query_ids[:, None, :, None] == seen.document_ids_BT[:, None, None, :])
        return allowed


def document_starts(document_ids_BT: Tensor) -> Tensor:
    """[B, T] bool: true where a document begins."""
    starts = torch.ones_like(document_ids_BT, dtype=torch.bool)
    starts[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    return starts


def document_positions(document_ids_BT: Tensor) -> Tensor:
    """[B, T] int64: index inside the document, 0 in padding (so that padding makes no row look longer than it is)."""
    return document_index(document_ids_BT).masked_fill(document_ids_BT < 0, 0)


def document_index(document_ids_BT: Tensor) -> Tensor:
    """[B, T] int64: how many positions of the same document, or of the same padding, come before."""
    index_T = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device)
    first_BT = torch.where(document_starts(document_ids_BT), index_T, 0).cummax(1).values
    return index_T - first_BT


def document_offsets(document_ids_BT: Tensor) -> Tensor:
    """[documents + 1] int32: where each document begins in the flattened batch, then its end.

    Waits for the device when the ids are on one; make it from the ids on the CPU and pass it as `cu_seqlens`.
    """
    flat = document_starts(document_ids_BT).flatten().nonzero().flatten()
    end = torch.full((1,), document_ids_BT.numel(), device=flat.device)
    return torch.cat([flat, end]).int()


def prompt_parts(input_ids_BT: Tensor, config: PrefixConfig, document_ids_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """What GLM reads from the tokens themselves: (prefix_BT bool, positions [B, C, T] or [B, T] int64).

    Positions follow ChatGLM-6B's final code (April 2023) and GLM-130B's generate.py: see PrefixConfig. A document
    without a start token is causal throughout and its positions simply count.
    """
    T = input_ids_BT.shape[1]
    ids_BT = document_ids_BT if document_ids_BT is not None else torch.zeros_like(input_ids_BT)
    index_BT = document_index(ids_BT)
    segment_BT = document_starts(ids_BT).long().cumsum(1) - 1

    def first(token: int | None) -> Tensor:
        """Index in its document of the first `token`, T where there is none; [B, T]."""
        if token is None:
            return torch.full_like(index_BT, T)
        where = torch.where(input_ids_BT == token, index_BT, T)
        least = torch.full_like(index_BT, T).scatter_reduce(1, segment_BT, where, "amin")
        return least.gather(1, segment_BT)

    start, gmask, mask = first(config.start_token_id), first(config.gmask_token_id), first(config.mask_token_id)
    found = start < T
    prefix_BT = found & (index_BT < start)
    answer = found & (index_BT >= start)
    if config.two_dimensional:
        still = torch.where(gmask < T, gmask, mask)
        outer = torch.where(answer & (still < T), still, index_BT)
        inner = torch.where(answer, index_BT - start + 1, 0)
        return prefix_BT, torch.stack([outer, inner], 1)
    return prefix_BT, torch.where(answer & (gmask == T) & (mask < T), mask, index_BT)
