"""BLOOM and BLOOMZ: ALiBi, LayerNorm after the embedding, fused queries, keys and values head by head, tied head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainwright.model.config import (
    AttentionConfig,
    BlockConfig,
    EmbeddingConfig,
    HeadConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    ResidualConfig,
)
from trainwright.model.families import reading
from trainwright.model.families.family import Family, Row

_ATTENTION = "layers.{n}.self_attn."
ROWS = (
    Row("word_embeddings", "embed_tokens"),
    Row("word_embeddings_layernorm", "embed_norm"),
    Row("h.{n}.input_layernorm", "layers.{n}.input_layernorm"),
    Row(
        "h.{n}.self_attention.query_key_value",
        (_ATTENTION + "q_proj", _ATTENTION + "k_proj", _ATTENTION + "v_proj"),
        "heads",
    ),
    Row("h.{n}.self_attention.dense", _ATTENTION + "o_proj"),
    Row("h.{n}.post_attention_layernorm", "layers.{n}.post_attention_layernorm"),
    Row("h.{n}.mlp.dense_h_to_4h", "layers.{n}.mlp.up_proj"),
    Row("h.{n}.mlp.dense_4h_to_h", "layers.{n}.mlp.down_proj"),
    Row("ln_f", "norm"),
    Row("lm_head", "lm_head"),
)


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    hidden = reading.need(config, "hidden_size", "n_embed")
    heads = reading.need(config, "n_head", "num_attention_heads")
    norm = NormConfig(hidden, config.get("layer_norm_epsilon", 1e-5), "layer")
    normed_stream = config.get("apply_residual_connection_post_layernorm", False)
    layer = BlockConfig(
        AttentionConfig.of(hidden, heads, qkv_bias=True, o_bias=True, alibi=True),
        MlpConfig.of(hidden, 4 * hidden, gated=False, bias=True, activation="gelu_tanh"),
        norm,
        norm,
        ResidualConfig("scaled") if normed_stream else ResidualConfig(),
    )
    vocab = config["vocab_size"]
    return ModelConfig(
        family="bloom",
        embed_tokens=EmbeddingConfig(vocab, hidden),
        embed_norm=norm,
        layers=(layer,) * reading.need(config, "n_layer", "num_hidden_layers"),
        norm=norm,
        lm_head=HeadConfig(hidden, vocab, tied=bool(config.get("tie_word_embeddings", True))),
        max_position_embeddings=config.get("seq_length") or 2048,
        initializer_range=config.get("initializer_range", 0.02),
        source=dict(config),
        **reading.token_ids(config),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    layer = config.layers[0]
    return {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "n_head": layer.self_attn.num_heads,
        "n_layer": config.num_layers,
        "layer_norm_epsilon": layer.input_layernorm.eps,
        "apply_residual_connection_post_layernorm": layer.residual.kind == "scaled",
        "initializer_range": config.initializer_range,
        "seq_length": config.max_position_embeddings,
        "tie_word_embeddings": config.lm_head.tied,
        **reading.spell_token_ids(config),
    }


BLOOM = Family("bloom", from_hf, to_hf, ROWS, prefixes=("", "transformer."))
