"""GLM-130B: DeepNorm, GeGLU, one-channel rotary positions, prefix mask, tied head.

There is no Hugging Face config of it: the keys are the arguments of the published model script, weight names those of a
checkpoint merged to model-parallel size 1. The token ids are those of its tokenizer unless config.json says others.
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
)
from trainwright.model.families import reading
from trainwright.model.families.chatglm import LAYER_ROWS, inverse_frequencies
from trainwright.model.families.family import Family, Row

if TYPE_CHECKING:
    from torch import Tensor

ROWS = (
    Row("transformer.word_embeddings", "embed_tokens"),
    *LAYER_ROWS,
    # The second half of the rows is the gate: first * gelu(second).
    Row("transformer.layers.{n}.mlp.dense_h_to_4h", ("layers.{n}.mlp.up_proj", "layers.{n}.mlp.gate_proj"), "blocks"),
    Row("transformer.final_layernorm", "norm"),
)
_TOKENS = {"mask_token_id": 150000, "gmask_token_id": 150001, "sop_token_id": 150004, "eop_token_id": 150005}


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    reading.refuse(config, layernorm_order="post")
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_layers"]
    vocab, tokens = config["vocab_size"], {**_TOKENS, **config}
    norm = NormConfig(hidden, config.get("layernorm_epsilon", 1e-5), "layer")
    layer = BlockConfig(
        AttentionConfig.of(
            hidden,
            heads,
            qkv_bias=True,
            o_bias=True,
            rope=RopeConfig(hidden // heads, float16_frequencies=True),
            mask=MaskConfig("prefix"),
        ),
        MlpConfig.of(hidden, config["inner_hidden_size"], bias=True, activation="gelu"),
        norm,
        norm,
        ResidualConfig("scaled", math.sqrt(2 * layers)),
    )
    return ModelConfig(
        family="glm_130b",
        embed_tokens=EmbeddingConfig(vocab, hidden),
        layers=(layer,) * layers,
        norm=norm,
        lm_head=HeadConfig(hidden, vocab, tied=True),
        max_position_embeddings=config.get("max_sequence_length", 2048),
        prefix=PrefixConfig(tokens["sop_token_id"], tokens["gmask_token_id"], tokens["mask_token_id"]),
        bos_token_id=tokens["sop_token_id"],
        eos_token_ids=(tokens["eop_token_id"],),
        source=dict(config),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    layer, prefix = config.layers[0], config.prefix
    assert isinstance(layer.mlp, MlpConfig)
    assert prefix is not None
    ids = (prefix.mask_token_id, prefix.gmask_token_id, prefix.start_token_id, config.eos_token_ids[0])
    return {
        "architectures": ["GLM130B"],
        "model_type": "glm-130b",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "inner_hidden_size": layer.mlp.intermediate_size,
        "num_attention_heads": layer.self_attn.num_heads,
        "num_layers": config.num_layers,
        "layernorm_epsilon": layer.input_layernorm.eps,
        "max_sequence_length": config.max_position_embeddings,
        "layernorm_order": "post",
        **dict(zip(_TOKENS, ids, strict=True)),
    }


def constants(config: ModelConfig) -> dict[str, Callable[[], Tensor]]:
    rope = config.layers[0].self_attn.rope
    return {"mixins.rotary-embedding.rotary_emb.inv_freq": partial(inverse_frequencies, rope)} if rope else {}


GLM_130B = Family("glm_130b", from_hf, to_hf, ROWS, constants=constants)
