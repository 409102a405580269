"""Qwen3-MoE: Qwen 3's attention, experts in the sparse layers, dense MLPs in those that the config names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trainwright.errors import UserError
from trainwright.model.config import MaskConfig, MlpConfig, ModelConfig, MoeConfig
from trainwright.model.families import llama, reading
from trainwright.model.families.family import Family, Row
from trainwright.model.families.mistral import window
from trainwright.model.families.qwen2 import masks, spell_masks
from trainwright.model.families.qwen3 import blocks

_MOE = "model.layers.{n}.mlp."
ROWS = (
    *llama.OUTER,
    *llama.ATTENTION,
    *llama.MLP,
    Row(_MOE + "gate", "layers.{n}.mlp.gate"),
    *(
        Row(_MOE + "experts.{e}." + name, "layers.{n}.mlp.experts." + name, "stack")
        for name in ("gate_proj", "up_proj", "down_proj")
    ),
)


def _masks(config: Mapping[str, Any]) -> list[MaskConfig]:
    """A window in every layer or in none: the published code reads no max_window_layers here."""
    found = masks(reading.Keys({**config, "max_window_layers": config.get("max_window_layers", 0)}))
    wanted = MaskConfig(window=window(config) if config.get("use_sliding_window") else None)
    if any(mask != wanted for mask in found):
        raise UserError(
            "use_sliding_window of config.json is for every layer in Qwen3-MoE's published code: "
            "set max_window_layers to 0 and layer_types to null"
        )
    return found


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    moe = MoeConfig.of(
        config["hidden_size"],
        config["moe_intermediate_size"],
        reading.need(config, "num_experts", "num_local_experts"),
        config["num_experts_per_tok"],
        reading.activation(config.get("hidden_act", "silu")),
        norm_topk=bool(config.get("norm_topk_prob", False)),
        aux_loss_coef=config.get("router_aux_loss_coef", 0.001),
    )
    dense, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step", 1)
    layers = tuple(
        layer if n in dense or (n + 1) % step else replace(layer, mlp=moe)
        for n, layer in enumerate(blocks(config, _masks(config)))
    )
    return llama.decoder("qwen3_moe", config, layers)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    moe = next(layer.mlp for layer in config.layers if isinstance(layer.mlp, MoeConfig))
    dense = next((layer.mlp for layer in config.layers if isinstance(layer.mlp, MlpConfig)), None)
    return (
        llama.spell_decoder(config, "qwen3_moe", "Qwen3MoeForCausalLM")
        | spell_masks(config)
        | {
            "attention_bias": config.layers[0].self_attn.q_proj.bias,
            "hidden_act": reading.spell_activation(moe.experts.activation),
            "intermediate_size": dense.intermediate_size if dense else config.source.get("intermediate_size", 6144),
            "moe_intermediate_size": moe.experts.intermediate_size,
            "num_experts": moe.experts.num_experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": moe.norm_topk,
            "router_aux_loss_coef": moe.aux_loss_coef,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [n for n, layer in enumerate(config.layers) if isinstance(layer.mlp, MlpConfig)],
        }
    )


QWEN3_MOE = Family("qwen3_moe", from_hf, to_hf, ROWS, ignored=llama.IGNORED)
