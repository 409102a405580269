"""The attention layer: projections, head norms, positions, cache. The kernel itself is kernels/attention.py.

Head counts are read from the tensors, so a layer whose projections hold a slice of the heads works as it is.
`core` has no weights and sees q, k and v of whole rows: sequence parallelism wraps it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainwright.model.cache import LayerCache
from trainwright.model.config import AttentionConfig
from trainwright.model.kernels.attention import Backend, attention
from trainwright.model.linear import build_linear, project
from trainwright.model.mask import AttentionMask
from trainwright.model.norm import Norm
from trainwright.model.position import Rotary, apply_rotary


@dataclass(frozen=True)
class LayerContext:
    """What a pass knows and a layer needs beside its input: made once for each kind of layer, never a gradient.

    One opaque object, so that no wrapper that casts a layer's tensor arguments to bf16 rounds angles or slopes.
    """

    mask: AttentionMask
    rotary: Rotary | None = None
    slopes_N: Tensor | None = None
    logn_BS: Tensor | None = None
    real_BS: Tensor | None = None


class AttentionCore(nn.Module):
    """softmax(q k^T / sqrt(D)) v. [B, S, N, D], [B, T, K, D] twice -> [B, S, N, D]."""

    def __init__(self, scale: float, backend: Backend = "auto") -> None:
        super().__init__()
        self.scale = scale
        self.backend: Backend = backend

    def forward(
        self, q_BSND: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, mask: AttentionMask, slopes_N: Tensor | None = None
    ) -> Tensor:
        return attention(q_BSND, k_BTKD, v_BTKD, mask, scale=self.scale, slopes_N=slopes_N, backend=self.backend)


class Attention(nn.Module):
    """Grouped-query attention with what its config names: biases, q and k norms, rotary, ALiBi, log-n."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.rope = config.rope
        self.q_proj = build_linear(config.q_proj)
        self.k_proj = build_linear(config.k_proj)
        self.v_proj = build_linear(config.v_proj)
        self.o_proj = build_linear(config.o_proj)
        self.q_norm = Norm(config.q_norm) if config.q_norm else None
        self.k_norm = Norm(config.k_norm) if config.k_norm else None
        self.core = AttentionCore(1 / math.sqrt(config.head_dim))

    def forward(
        self,
        x_BSH: Tensor,
        context: LayerContext,
        cache: LayerCache | None = None,
    ) -> Tensor:
        q_BSND, k_BSKD, v_BSKD = (
            part.unflatten(-1, (-1, self.head_dim)) for part in project(x_BSH, self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BSND, k_BSKD = self.q_norm(q_BSND), self.k_norm(k_BSKD)
        if self.rope is not None and context.rotary is not None:
            q_BSND = apply_rotary(q_BSND, context.rotary, self.rope)
            k_BSKD = apply_rotary(k_BSKD, context.rotary, self.rope)
        if cache is not None:
            k_BSKD, v_BSKD = cache.append(k_BSKD, v_BSKD)
        if context.logn_BS is not None:
            q_BSND = q_BSND * context.logn_BS[..., None, None].to(q_BSND.dtype)
        out_BSND = self.core(q_BSND, k_BSKD, v_BSKD, context.mask, context.slopes_N)
        return self.o_proj(out_BSND.flatten(-2))


def logn_factors(position_ids_BS: Tensor, logn_length: int) -> Tensor:
    """Qwen 1: log(p + 1) / log(trained length) for queries beyond it, else 1. [B, S] float32."""
    return (torch.log(position_ids_BS + 1.0) / math.log(logn_length)).clamp(min=1.0)
