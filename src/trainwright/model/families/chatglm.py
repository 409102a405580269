"""ChatGLM-6B v1 and v1.1: two-channel rotary positions, prefix mask, residual of the normalised value times a.

Positions, prompt and frozen channel follow the published code of April 2023; its rotary frequencies are rounded to
float16, which matters (config.RopeConfig).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from trainwright.model.config import (
    AttentionConfig,
    BlockConfig,
    EmbeddingConfig,
    HeadConfig,
    MaskConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    PrefixConfig,
    ResidualConfig,
    RopeConfig,
    even_head_dim,
)
from trainwright.model.families import reading
from trainwright.model.families.family import Family, Row

if TYPE_CHECKING:
    from torch import Tensor

_ATTENTION = "layers.{n}.self_attn."
LAYER_ROWS = (
    Row("transformer.layers.{n}.input_layernorm", "layers.{n}.input_layernorm"),
    Row(
        "transformer.layers.{n}.attention.query_key_value",
        (_ATTENTION + "q_proj", _ATTENTION + "k_proj", _ATTENTION + "v_proj"),
        "heads",
    ),
    Row("transformer.layers.{n}.attention.dense", _ATTENTION + "o_proj"),
    Row("transformer.layers.{n}.post_attention_layernorm", "layers.{n}.post_attention_layernorm"),
    Row("transformer.layers.{n}.mlp.dense_4h_to_h", "layers.{n}.mlp.down_proj"),
)
"""Shared with GLM-130B."""

ROWS = (
    Row("transformer.word_embeddings", "embed_tokens"),
    *LAYER_ROWS,
    Row("transformer.layers.{n}.mlp.dense_h_to_4h", "layers.{n}.mlp.up_proj"),
    Row("transformer.final_layernorm", "norm"),
    Row("lm_head", "lm_head"),
)


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    reading.refuse(config, position_encoding_2d=True, pre_seq_len=None, quantization_bit=0)
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_layers"]
    vocab = config["vocab_size"]
    head_dim = even_head_dim(hidden, heads)
    norm = NormConfig(hidden, config.get("layernorm_epsilon", 1e-5), "layer")
    layer = BlockConfig(
        AttentionConfig.of(
            hidden,
            heads,
            qkv_bias=True,
            o_bias=True,
            rope=RopeConfig(head_dim // 2, channels=2, float16_frequencies=True),
            mask=MaskConfig("prefix"),
        ),
        MlpConfig.of(hidden, config["inner_hidden_size"], gated=False, bias=True, activation="gelu_tanh"),
        norm,
        norm,
        ResidualConfig("scaled", math.sqrt(2 * layers)),
    )
    return ModelConfig(
        family="chatglm",
        embed_tokens=EmbeddingConfig(vocab, hidden),
        layers=(layer,) * layers,
        norm=norm,
        lm_head=HeadConfig(hidden, vocab, tied=bool(config.get("tie_word_embeddings", False))),
        max_position_embeddings=config.get("max_sequence_length", 2048),
        prefix=PrefixConfig(
            config["bos_token_id"], config["gmask_token_id"], config.get("mask_token_id"), two_dimensional=True
        ),
        source=dict(config),
        **reading.token_ids(config),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    layer, prefix = config.layers[0], config.prefix
    assert isinstance(layer.mlp, MlpConfig)
    assert prefix is not None
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "inner_hidden_size": layer.mlp.intermediate_size,
        "num_attention_heads": layer.self_attn.num_heads,
        "num_layers": config.num_layers,
        "layernorm_epsilon": layer.input_layernorm.eps,
        "max_sequence_length": config.max_position_embeddings,
        "position_encoding_2d": True,
        "tie_word_embeddings": config.lm_head.tied,
        "gmask_token_id": prefix.gmask_token_id,
        "mask_token_id": prefix.mask_token_id,
        **reading.spell_token_ids(config),
        "bos_token_id": prefix.start_token_id,
    }


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """The buffer that the published checkpoints carry."""
    from trainwright.model.position import inverse_frequencies as compute

    return compute(rope)


def constants(config: ModelConfig) -> dict[str, Callable[[], Tensor]]:
    ropes = [layer.self_attn.rope for layer in config.layers]
    name = "transformer.layers.{}.attention.rotary_emb.inv_freq"
    return {name.format(n): partial(inverse_frequencies, rope) for n, rope in enumerate(ropes) if rope}


CHATGLM = Family("chatglm", from_hf, to_hf, ROWS, constants=constants)
