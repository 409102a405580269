"""Qwen 1.5, 2 and 2.5: Llama's shape with biases on q, k and v, and a sliding window in the upper layers if asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainwright.errors import UserError
from trainwright.model.config import MaskConfig, ModelConfig
from trainwright.model.families import llama, mistral
from trainwright.model.families.family import Family


def masks(config: Mapping[str, Any]) -> list[MaskConfig]:
    """Each layer's mask: `layer_types` where given, else a window from layer `max_window_layers` on."""
    layers = config["num_hidden_layers"]
    window = mistral.window(config) if config.get("use_sliding_window") else None
    types = config.get("layer_types")
    if types is None:
        windowed = [n >= config.get("max_window_layers", 28) for n in range(layers)]
    else:
        windowed = [_windowed(kind, window) for kind in types]
    if len(windowed) != layers:
        raise UserError(
            f"layer_types of config.json names {len(windowed)} layers, num_hidden_layers is {layers}: "
            "change both, or set layer_types to null"
        )
    return [MaskConfig(window=window if this else None) for this in windowed]


def _windowed(kind: str, window: int | None) -> bool:
    if kind not in ("full_attention", "sliding_attention"):
        raise UserError(f"layer_types of config.json has {kind!r}: only full_attention and sliding_attention are known")
    if kind == "sliding_attention" and window is None:
        raise UserError(
            "layer_types of config.json has sliding_attention: set use_sliding_window and sliding_window too"
        )
    return kind == "sliding_attention"


def spell_masks(config: ModelConfig) -> dict[str, Any]:
    windows = [layer.self_attn.mask.window for layer in config.layers]
    first = next((n for n, window in enumerate(windows) if window), config.num_layers)
    return {
        "use_sliding_window": first < config.num_layers,
        "sliding_window": windows[first] if first < config.num_layers else None,
        "max_window_layers": first,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    layers = tuple(llama.block(config, qkv_bias=True, mask=mask) for mask in masks(config))
    return llama.decoder("qwen2", config, layers)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    return llama.spell_decoder(config, "qwen2", "Qwen2ForCausalLM") | spell_masks(config)


QWEN2 = Family("qwen2", from_hf, to_hf, (*llama.OUTER, *llama.ATTENTION, *llama.MLP), ignored=llama.IGNORED)
