"""GPT-2 and GPT-3: learned positions, LayerNorm, tanh GELU, tied head; weights stored [in, out].

GPT-3 (Brown et al. 2020, section 2.1) alternates dense and locally banded layers: the key `banded_window`, which is
ours, makes every second layer see that many positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trainwright.model.config import (
    AttentionConfig,
    BlockConfig,
    EmbeddingConfig,
    HeadConfig,
    MaskConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    PositionTableConfig,
)
from trainwright.model.families import reading
from trainwright.model.families.family import Family, Row

_ATTENTION = "layers.{n}.self_attn."
ROWS = (
    Row("wte", "embed_tokens"),
    Row("wpe", "embed_positions"),
    Row("h.{n}.ln_1", "layers.{n}.input_layernorm"),
    Row(
        "h.{n}.attn.c_attn",
        (_ATTENTION + "q_proj", _ATTENTION + "k_proj", _ATTENTION + "v_proj"),
        "blocks",
        transposed=True,
    ),
    Row("h.{n}.attn.c_proj", _ATTENTION + "o_proj", transposed=True),
    Row("h.{n}.ln_2", "layers.{n}.post_attention_layernorm"),
    Row("h.{n}.mlp.c_fc", "layers.{n}.mlp.up_proj", transposed=True),
    Row("h.{n}.mlp.c_proj", "layers.{n}.mlp.down_proj", transposed=True),
    Row("ln_f", "norm"),
)


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    reading.refuse(config, scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True, add_cross_attention=False)
    hidden, vocab = config["n_embd"], config["vocab_size"]
    norm = NormConfig(hidden, config.get("layer_norm_epsilon", 1e-5), "layer")
    act = reading.activation(config.get("activation_function", "gelu_new"))
    attention = AttentionConfig.of(hidden, config["n_head"], qkv_bias=True, o_bias=True)
    mlp = MlpConfig.of(hidden, config.get("n_inner") or 4 * hidden, gated=False, bias=True, activation=act)
    banded = replace(attention, mask=MaskConfig(window=config.get("banded_window")))
    positions = config.get("n_positions", 1024)
    return ModelConfig(
        family="gpt2",
        embed_tokens=EmbeddingConfig(vocab, hidden),
        embed_positions=PositionTableConfig(positions, hidden),
        layers=tuple(BlockConfig(banded if n % 2 else attention, mlp, norm, norm) for n in range(config["n_layer"])),
        norm=norm,
        lm_head=HeadConfig(hidden, vocab, tied=bool(config.get("tie_word_embeddings", True))),
        max_position_embeddings=positions,
        initializer_range=config.get("initializer_range", 0.02),
        source=dict(config),
        **reading.token_ids(config),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    layer = config.layers[0]
    assert isinstance(layer.mlp, MlpConfig)
    windows = [banded.self_attn.mask.window for banded in config.layers[1::2]]
    window = {"banded_window": windows[0]} if windows and windows[0] else {}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_head": layer.self_attn.num_heads,
        "n_layer": config.num_layers,
        "n_inner": layer.mlp.intermediate_size,
        "n_positions": config.max_position_embeddings,
        "n_ctx": config.max_position_embeddings,
        "activation_function": reading.spell_activation(layer.mlp.activation),
        "layer_norm_epsilon": layer.input_layernorm.eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.lm_head.tied,
        **window,
        **reading.spell_token_ids(config),
    }


GPT2 = Family(
    "gpt2",
    from_hf,
    to_hf,
    (*ROWS, Row("lm_head", "lm_head")),
    prefixes=("", "transformer."),
    ignored=("*.attn.bias", "*.attn.masked_bias"),
)
