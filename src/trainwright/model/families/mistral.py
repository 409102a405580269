"""Mistral: Llama's shape with a sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainwright.model.config import MaskConfig, ModelConfig
from trainwright.model.families import llama, reading
from trainwright.model.families.family import Family


def window(config: Mapping[str, Any]) -> int | None:
    """`sliding_window`: null is none, and where the key is not there the published code takes 4096."""
    return config.get("sliding_window") if "sliding_window" in config else 4096


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    reading.refuse(config, layer_types=None)
    layer = llama.block(config, mask=MaskConfig(window=window(config)))
    return llama.decoder("mistral", config, (layer,) * config["num_hidden_layers"])


def to_hf(config: ModelConfig) -> dict[str, Any]:
    spelled = llama.spell_decoder(config, "mistral", "MistralForCausalLM")
    return spelled | {"sliding_window": config.layers[0].self_attn.mask.window}


MISTRAL = Family("mistral", from_hf, to_hf, (*llama.OUTER, *llama.ATTENTION, *llama.MLP), ignored=llama.IGNORED)
