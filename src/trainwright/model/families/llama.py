"""LLaMA 1, 2, 3, 3.1, 3.2 and everything of its shape: pre-norm RMSNorm, rotary, SwiGLU, grouped queries.

Other families of this shape (Mistral, Qwen 2 and 3, the mixtures) start from `decoder` and `spell_decoder`.
"""

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
    even_head_dim,
)
from trainwright.model.families import reading
from trainwright.model.families.family import Family, Row

ATTENTION = (
    Row("model.layers.{n}.input_layernorm", "layers.{n}.input_layernorm"),
    *(
        Row(f"model.layers.{{n}}.self_attn.{name}", f"layers.{{n}}.self_attn.{name}")
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    ),
    Row("model.layers.{n}.post_attention_layernorm", "layers.{n}.post_attention_layernorm"),
)
MLP = tuple(
    Row(f"model.layers.{{n}}.mlp.{name}", f"layers.{{n}}.mlp.{name}") for name in ("gate_proj", "up_proj", "down_proj")
)
OUTER = (
    Row("model.embed_tokens", "embed_tokens"),
    Row("model.norm", "norm"),
    Row("lm_head", "lm_head"),
)
IGNORED = ("*.rotary_emb.inv_freq",)


def block(
    config: Mapping[str, Any],
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    head_dim: int | None = None,
    rope_theta: float = 10000.0,
    rms_norm_eps: float = 1e-6,
    **attention: Any,
) -> BlockConfig:
    """One layer from the keys that these families share; the last three numbers are for keys that are not there."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or head_dim or even_head_dim(hidden, heads)
    norm = NormConfig(hidden, config.get("rms_norm_eps", rms_norm_eps))
    act = reading.activation(config.get("hidden_act", "silu"))
    return BlockConfig(
        AttentionConfig.of(
            hidden,
            heads,
            config.get("num_key_value_heads") or heads,
            head_dim,
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            rope=reading.rope(config, head_dim, rope_theta),
            **attention,
        ),
        MlpConfig.of(hidden, config["intermediate_size"], bias=bool(config.get("mlp_bias")), activation=act),
        norm,
        norm,
    )


def decoder(
    family: str,
    config: Mapping[str, Any],
    layers: tuple[BlockConfig, ...],
    *,
    rms_norm_eps: float = 1e-6,
    **parts: Any,
) -> ModelConfig:
    """The whole model around its layers."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    return ModelConfig(
        family=family,
        embed_tokens=EmbeddingConfig(vocab, hidden, reading.padding_idx(config)),
        layers=layers,
        norm=NormConfig(hidden, config.get("rms_norm_eps", rms_norm_eps)),
        lm_head=HeadConfig(hidden, vocab, tied=bool(config.get("tie_word_embeddings", False))),
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        initializer_range=config.get("initializer_range", 0.02),
        source=dict(config),
        **reading.token_ids(config),
        **parts,
    )


def spell_decoder(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """`decoder` and `block` backwards."""
    first = config.layers[0]
    attention = first.self_attn
    spelled = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": first.input_layernorm.eps,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.lm_head.tied,
        **reading.spell_token_ids(config),
    }
    if attention.rope:
        spelled |= reading.spell_rope(attention.rope, attention.head_dim)
    if isinstance(first.mlp, MlpConfig):
        spelled["intermediate_size"] = first.mlp.intermediate_size
        spelled["hidden_act"] = reading.spell_activation(first.mlp.activation)
    return spelled


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    bias = bool(config.get("attention_bias", False))
    layer = block(config, qkv_bias=bias, o_bias=bias)
    return decoder("llama", config, (layer,) * config["num_hidden_layers"])


def to_hf(config: ModelConfig) -> dict[str, Any]:
    first = config.layers[0]
    return spell_decoder(config, "llama", "LlamaForCausalLM") | {
        "attention_bias": first.self_attn.q_proj.bias,
        "mlp_bias": isinstance(first.mlp, MlpConfig) and first.mlp.up_proj.bias,
    }


LLAMA = Family("llama", from_hf, to_hf, (*OUTER, *ATTENTION, *MLP), ignored=IGNORED)
