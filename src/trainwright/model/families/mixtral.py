"""Mixtral: Mistral's attention, experts in place of every MLP, the chosen probabilities made to sum to one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trainwright.model.config import MaskConfig, ModelConfig, MoeConfig
from trainwright.model.families import llama, reading
from trainwright.model.families.family import Family, Row

_MOE = "model.layers.{n}.block_sparse_moe."
ROWS = (
    *llama.OUTER,
    *llama.ATTENTION,
    Row(_MOE + "gate", "layers.{n}.mlp.gate"),
    Row(_MOE + "experts.{e}.w1", "layers.{n}.mlp.experts.gate_proj", "stack"),
    Row(_MOE + "experts.{e}.w2", "layers.{n}.mlp.experts.down_proj", "stack"),
    Row(_MOE + "experts.{e}.w3", "layers.{n}.mlp.experts.up_proj", "stack"),
)

EPS = 1e-5
"""Of the norms, where config.json does not say."""


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    reading.refuse(config, router_jitter_noise=0.0)
    moe = MoeConfig.of(
        config["hidden_size"],
        config["intermediate_size"],
        reading.need(config, "num_local_experts", "num_experts"),
        config["num_experts_per_tok"],
        reading.activation(config.get("hidden_act", "silu")),
        aux_loss_coef=config.get("router_aux_loss_coef", 0.001),
    )
    mask = MaskConfig(window=config.get("sliding_window"))
    layer = llama.block(config, mask=mask, rope_theta=1e6, rms_norm_eps=EPS)
    layers = (replace(layer, mlp=moe),) * config["num_hidden_layers"]
    return llama.decoder("mixtral", config, layers, rms_norm_eps=EPS)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    layer = config.layers[0]
    assert isinstance(layer.mlp, MoeConfig)
    return llama.spell_decoder(config, "mixtral", "MixtralForCausalLM") | {
        "intermediate_size": layer.mlp.experts.intermediate_size,
        "hidden_act": reading.spell_activation(layer.mlp.experts.activation),
        "num_local_experts": layer.mlp.experts.num_experts,
        "num_experts_per_tok": layer.mlp.top_k,
        "router_aux_loss_coef": layer.mlp.aux_loss_coef,
        "sliding_window": layer.self_attn.mask.window,
    }


MIXTRAL = Family("mixtral", from_hf, to_hf, ROWS, ignored=llama.IGNORED)
