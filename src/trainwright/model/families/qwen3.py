"""Qwen 3, dense: Llama's shape with RMSNorm on every head's queries and keys before rotation, head_dim of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainwright.model.config import BlockConfig, MaskConfig, ModelConfig, NormConfig
from trainwright.model.families import llama
from trainwright.model.families.family import Family
from trainwright.model.families.qwen2 import masks, spell_masks

HEAD_DIM = 128
"""What the published code takes where config.json does not say."""


def blocks(config: Mapping[str, Any], masks: Sequence[MaskConfig]) -> tuple[BlockConfig, ...]:
    """The dense layers; Qwen3-MoE changes their MLPs."""
    bias, head_dim = bool(config.get("attention_bias", False)), config.get("head_dim", HEAD_DIM)
    norm = NormConfig(head_dim, config.get("rms_norm_eps", 1e-6))
    parts = {"qkv_bias": bias, "o_bias": bias, "head_dim": head_dim, "q_norm": norm, "k_norm": norm}
    return tuple(llama.block(config, **parts, mask=mask) for mask in masks)


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    return llama.decoder("qwen3", config, blocks(config, masks(config)))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    return (
        llama.spell_decoder(config, "qwen3", "Qwen3ForCausalLM")
        | spell_masks(config)
        | {"attention_bias": config.layers[0].self_attn.q_proj.bias}
    )


QWEN3 = Family("qwen3", from_hf, to_hf, (*llama.OUTER, *llama.ATTENTION, *llama.MLP), ignored=llama.IGNORED)
