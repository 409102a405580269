"""Positions: rotary tables in all their variants, ALiBi slopes. Owns the formulas; learned tables are embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trainwright.model.config import (
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    QwenNtkScaling,
    RopeConfig,
    YarnScaling,
)

Rotary = tuple[Tensor, Tensor]
"""cos and sin, float32, [B or 1, S, 1, R], or [B or 1, S, 1, C, R] with several channels."""


def inverse_frequencies(rope: RopeConfig, lengths_B1: Tensor | None = None, device: Any = None) -> Tensor:
    """Angles per position, float32: [R], or [B, R] where they depend on each row's length.

    `lengths_B1` is the longest length seen so far, needed by dynamic scalings only: [B, 1] int64.
    """
    exponent_R = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32, device=device) / rope.rotary_dim
    match rope.scaling:
        case DynamicNtkScaling(factor, original) if lengths_B1 is not None:
            length = lengths_B1.max().clamp(min=original).float()
            stretch = (factor * length / original - (factor - 1)) ** (rope.rotary_dim / (rope.rotary_dim - 2))
            frequency = 1.0 / (rope.theta * stretch) ** exponent_R
        case QwenNtkScaling(seq_length) if lengths_B1 is not None:
            doublings = torch.arange(24, device=device)  # ceil(log2(length / seq_length)) in exact integers
            power_B1 = (lengths_B1[..., None] > seq_length * 2**doublings).sum(-1)
            alpha_B1 = (2 ** (power_B1 + 1) - 1).float()
            frequency = 1.0 / (rope.theta * alpha_B1 ** (rope.rotary_dim / (rope.rotary_dim - 2))) ** exponent_R
        case _:
            frequency = 1.0 / rope.theta**exponent_R
            frequency = _scaled(rope, frequency)
    return frequency.half().float() if rope.float16_frequencies else frequency


def _scaled(rope: RopeConfig, frequency_R: Tensor) -> Tensor:
    match rope.scaling:
        case LinearScaling(factor):
            return frequency_R / factor
        case Llama3Scaling(factor, low, high, original):
            wavelength = 2 * math.pi / frequency_R
            blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)
            return (1 - blend) * frequency_R / factor + blend * frequency_R
        case YarnScaling() as yarn:
            return _yarn(rope, yarn, frequency_R)
    return frequency_R


def _yarn(rope: RopeConfig, yarn: YarnScaling, frequency_R: Tensor) -> Tensor:
    """YaRN, section 3.2: dimensions that turn more than beta_fast times in the trained length are kept, those that
    turn less than beta_slow times are interpolated, a ramp between."""

    def dimension(turns: float) -> float:
        trained = yarn.original_max_position_embeddings
        return rope.rotary_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    index_R = torch.arange(rope.rotary_dim // 2, dtype=torch.float32, device=frequency_R.device)
    ramp_R = ((index_R - low) / ((high - low) or 0.001)).clamp(0, 1)
    return frequency_R / yarn.factor * ramp_R + frequency_R * (1 - ramp_R)


def rotary_tables(rope: RopeConfig, position_ids: Tensor, lengths_B1: Tensor | None = None) -> Rotary:
    """cos and sin of every angle. `position_ids` [B or 1, S], or [B or 1, C, S] with several channels."""
    frequency = inverse_frequencies(rope, lengths_B1, position_ids.device)
    frequency = frequency[:, None] if frequency.dim() == 2 else frequency
    positions = position_ids.transpose(1, 2) if rope.channels > 1 else position_ids
    if rope.channels > 1 and frequency.dim() == 3:
        frequency = frequency[:, None]
    angles = positions[..., None].float() * frequency
    factor = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
    cos, sin = angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)
    return (cos * factor, sin * factor) if factor != 1.0 else (cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Turns every pair of the last dim of x by its angle; x [..., 2R], cos and sin [..., R]."""
    wide = x.float()
    first, second = _pairs(wide, layout)
    if torch.compiler.is_compiling():
        join = torch.cat if layout == "half" else torch.stack
        return join([first * cos - second * sin, second * cos + first * sin], -1).view_as(x).to(x.dtype)
    out = torch.empty_like(wide)
    out_first, out_second = _pairs(out, layout)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out.to(x.dtype)


def _pairs(x: Tensor, layout: str) -> tuple[Tensor, ...]:
    """Views of the first and the second number of every pair."""
    return x.chunk(2, -1) if layout == "half" else (x[..., 0::2], x[..., 1::2])


class _Turn(torch.autograd.Function):
    """A rotation's gradient is the rotation back, so nothing but the shared tables is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.layout = layout
        return _turn(x, cos, sin, layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin, ctx.layout), None, None, None


def apply_rotary(x_BSND: Tensor, rotary: Rotary, rope: RopeConfig) -> Tensor:
    """Rotates the first channels x rotary_dim dimensions of every head, in float32; the rest passes."""
    cos, sin = rotary
    width = rope.channels * rope.rotary_dim
    turned = x_BSND[..., :width]
    if rope.channels > 1:
        turned = turned.unflatten(-1, (rope.channels, rope.rotary_dim))
    turn = _turn if torch.compiler.is_compiling() else _Turn.apply
    turned = turn(turned, cos, sin, rope.layout)
    if rope.channels > 1:
        turned = turned.flatten(-2)
    return turned if width == x_BSND.shape[-1] else torch.cat([turned, x_BSND[..., width:]], -1)


def alibi_slopes(num_heads: int) -> Tensor:
    """ALiBi (Press et al. 2021): 2^(-8k/m) for m, the largest power of two <= heads; then every second of 2m's."""
    m = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * k / m) for k in range(1, m + 1)]
    slopes += [2 ** (-4 * k / m) for k in range(1, 2 * (num_heads - m), 2)]
    return torch.tensor(slopes, dtype=torch.float32)
