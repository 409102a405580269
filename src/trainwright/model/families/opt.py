"""OPT: learned positions with an offset of two, LayerNorm, ReLU, tied head. The 350m is post-norm, its embeddings are
narrower than its layers and pass a projection on each side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainwright.model.config import (
    AttentionConfig,
    BlockConfig,
    EmbeddingConfig,
    HeadConfig,
    LinearConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    PositionTableConfig,
    ResidualConfig,
)
from trainwright.model.families import reading
from trainwright.model.families.family import Family, Row

_LAYER = "decoder.layers.{n}."
OFFSET = 2
ROWS = (
    Row("decoder.embed_tokens", "embed_tokens"),
    Row("decoder.embed_positions", "embed_positions"),
    Row("decoder.project_in", "project_in"),
    *(Row(f"{_LAYER}self_attn.{name}", f"layers.{{n}}.self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj")),
    Row(_LAYER + "self_attn.out_proj", "layers.{n}.self_attn.o_proj"),
    Row(_LAYER + "self_attn_layer_norm", "layers.{n}.input_layernorm"),
    Row(_LAYER + "fc1", "layers.{n}.mlp.up_proj"),
    Row(_LAYER + "fc2", "layers.{n}.mlp.down_proj"),
    Row(_LAYER + "final_layer_norm", "layers.{n}.post_attention_layernorm"),
    Row("decoder.final_layer_norm", "norm"),
    Row("decoder.project_out", "project_out"),
)


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    reading.refuse(config, layer_norm_elementwise_affine=True, tie_word_embeddings=True)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    width = config.get("word_embed_proj_dim") or hidden
    before = config.get("do_layer_norm_before", True)
    bias = config.get("enable_bias", True)
    norm = NormConfig(hidden, 1e-5, "layer")
    act = reading.activation(config.get("activation_function", "relu"))
    layer = BlockConfig(
        AttentionConfig.of(hidden, config["num_attention_heads"], qkv_bias=bias, o_bias=bias),
        MlpConfig.of(hidden, config["ffn_dim"], gated=False, bias=bias, activation=act),
        norm,
        norm,
        ResidualConfig("pre" if before else "post"),
    )
    length = config.get("max_position_embeddings", 2048)
    return ModelConfig(
        family="opt",
        embed_tokens=EmbeddingConfig(vocab, width, reading.padding_idx(config)),
        embed_positions=PositionTableConfig(length + OFFSET, hidden, OFFSET),
        project_in=LinearConfig(width, hidden) if width != hidden else None,
        layers=(layer,) * config["num_hidden_layers"],
        norm=norm if before and not config.get("_remove_final_layer_norm", False) else None,
        project_out=LinearConfig(hidden, width) if width != hidden else None,
        lm_head=HeadConfig(width, vocab, tied=True),
        max_position_embeddings=length,
        initializer_range=config.get("init_std", 0.02),
        source=dict(config),
        **reading.token_ids(config),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    layer = config.layers[0]
    assert isinstance(layer.mlp, MlpConfig)
    before = layer.residual.kind == "pre"
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "word_embed_proj_dim": config.embed_tokens.embedding_dim,
        "ffn_dim": layer.mlp.intermediate_size,
        "num_attention_heads": layer.self_attn.num_heads,
        "num_hidden_layers": config.num_layers,
        "activation_function": reading.spell_activation(layer.mlp.activation),
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and config.norm is None,
        "enable_bias": layer.self_attn.q_proj.bias,
        "max_position_embeddings": config.max_position_embeddings,
        "init_std": config.initializer_range,
        "tie_word_embeddings": True,
        **reading.spell_token_ids(config),
    }


OPT = Family("opt", from_hf, to_hf, ROWS, prefixes=("model.", ""))
