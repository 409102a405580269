"""Qwen 1: fused attention with the only biases, an MLP whose width the config doubles, dynamic NTK and log-n in
evaluation beyond the trained length."""

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
    QwenNtkScaling,
    RopeConfig,
    even_head_dim,
)
from trainwright.model.families import reading
from trainwright.model.families.family import Family, Row

_ATTENTION = "layers.{n}.self_attn."
ROWS = (
    Row("transformer.wte", "embed_tokens"),
    Row("transformer.h.{n}.ln_1", "layers.{n}.input_layernorm"),
    Row(
        "transformer.h.{n}.attn.c_attn",
        (_ATTENTION + "q_proj", _ATTENTION + "k_proj", _ATTENTION + "v_proj"),
        "blocks",
    ),
    Row("transformer.h.{n}.attn.c_proj", _ATTENTION + "o_proj"),
    Row("transformer.h.{n}.ln_2", "layers.{n}.post_attention_layernorm"),
    Row("transformer.h.{n}.mlp.w1", "layers.{n}.mlp.up_proj"),
    Row("transformer.h.{n}.mlp.w2", "layers.{n}.mlp.gate_proj"),
    Row("transformer.h.{n}.mlp.c_proj", "layers.{n}.mlp.down_proj"),
    Row("transformer.ln_f", "norm"),
    Row("lm_head", "lm_head"),
)


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    reading.refuse(config, no_bias=True, scale_attn_weights=True)
    hidden, heads, vocab = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    head_dim = config.get("kv_channels") or even_head_dim(hidden, heads)
    trained = config.get("seq_length", 2048)
    norm = NormConfig(hidden, config.get("layer_norm_epsilon", 1e-6))
    layer = BlockConfig(
        AttentionConfig.of(
            hidden,
            heads,
            heads,
            head_dim,
            qkv_bias=True,
            rope=RopeConfig(
                int(head_dim * config.get("rotary_pct", 1.0)),
                float(config.get("rotary_emb_base", 10000)),
                scaling=QwenNtkScaling(trained) if config.get("use_dynamic_ntk", True) else None,
            ),
            logn_length=trained if config.get("use_logn_attn", True) else None,
        ),
        MlpConfig.of(hidden, config["intermediate_size"] // 2),
        norm,
        norm,
    )
    return ModelConfig(
        family="qwen",
        embed_tokens=EmbeddingConfig(vocab, hidden),
        layers=(layer,) * config["num_hidden_layers"],
        norm=norm,
        lm_head=HeadConfig(hidden, vocab, tied=bool(config.get("tie_word_embeddings", False))),
        max_position_embeddings=trained,
        initializer_range=config.get("initializer_range", 0.02),
        source=dict(config),
        **reading.token_ids(config),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    layer = config.layers[0]
    attention, rope = layer.self_attn, layer.self_attn.rope
    assert isinstance(layer.mlp, MlpConfig)
    assert rope is not None
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": 2 * layer.mlp.intermediate_size,
        "kv_channels": attention.head_dim,
        "num_attention_heads": attention.num_heads,
        "num_hidden_layers": config.num_layers,
        "layer_norm_epsilon": layer.input_layernorm.eps,
        "rotary_emb_base": rope.theta,
        "rotary_pct": rope.rotary_dim / attention.head_dim,
        "use_dynamic_ntk": rope.scaling is not None,
        "use_logn_attn": attention.logn_length is not None,
        "seq_length": config.max_position_embeddings,
        "no_bias": True,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.lm_head.tied,
        **reading.spell_token_ids(config),
    }


QWEN = Family("qwen", from_hf, to_hf, ROWS, ignored=("*.rotary_emb.inv_freq", "*.attn.masked_bias"))
