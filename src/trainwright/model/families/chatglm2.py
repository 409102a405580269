"""ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B: grouped queries, RMSNorm, rotary in pairs on half of each head, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from trainwright.errors import UserError
from trainwright.model.config import (
    AttentionConfig,
    BlockConfig,
    EmbeddingConfig,
    HeadConfig,
    LinearScaling,
    MlpConfig,
    ModelConfig,
    NormConfig,
    ResidualConfig,
    RopeConfig,
)
from trainwright.model.families import reading
from trainwright.model.families.chatglm import inverse_frequencies
from trainwright.model.families.family import Family, Row

if TYPE_CHECKING:
    from torch import Tensor

_THEIRS = "transformer.encoder.layers.{n}."
_ATTENTION = "layers.{n}.self_attn."
ROWS = (
    Row("transformer.embedding.word_embeddings", "embed_tokens"),
    Row(_THEIRS + "input_layernorm", "layers.{n}.input_layernorm"),
    Row(
        _THEIRS + "self_attention.query_key_value",
        (_ATTENTION + "q_proj", _ATTENTION + "k_proj", _ATTENTION + "v_proj"),
        "blocks",
    ),
    Row(_THEIRS + "self_attention.dense", _ATTENTION + "o_proj"),
    Row(_THEIRS + "post_attention_layernorm", "layers.{n}.post_attention_layernorm"),
    Row(_THEIRS + "mlp.dense_h_to_4h", ("layers.{n}.mlp.gate_proj", "layers.{n}.mlp.up_proj"), "blocks"),
    Row(_THEIRS + "mlp.dense_4h_to_h", "layers.{n}.mlp.down_proj"),
    Row("transformer.encoder.final_layernorm", "norm"),
    Row("transformer.output_layer", "lm_head"),
)


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    reading.refuse(config, original_rope=True, pre_seq_len=None, quantization_bit=0)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    vocab, head_dim = config["padded_vocab_size"], config["kv_channels"]
    kind = "rms" if config.get("rmsnorm", True) else "layer"
    norm = NormConfig(hidden, config.get("layernorm_epsilon", 1e-5), kind)  # type: ignore[arg-type]
    bias = config.get("add_bias_linear", False)
    layer = BlockConfig(
        AttentionConfig.of(
            hidden,
            heads,
            config["multi_query_group_num"] if config.get("multi_query_attention") else heads,
            head_dim,
            qkv_bias=bias or config.get("add_qkv_bias", False),
            o_bias=bias,
            rope=_rope(config, head_dim),
        ),
        MlpConfig.of(hidden, config["ffn_hidden_size"], bias=bias),
        norm,
        norm,
        ResidualConfig("scaled" if config.get("apply_residual_connection_post_layernorm") else "pre"),
    )
    return ModelConfig(
        family="chatglm2",
        embed_tokens=EmbeddingConfig(vocab, hidden),
        layers=(layer,) * config["num_layers"],
        norm=norm if config.get("post_layer_norm", True) else None,
        lm_head=HeadConfig(hidden, vocab, tied=bool(config.get("tie_word_embeddings", False))),
        max_position_embeddings=config.get("seq_length", 2048),
        source=dict(config),
        **reading.token_ids(config),
    )


def _rope(config: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """`rope_ratio`: ChatGLM2-6B-32K divides positions by it, ChatGLM3-6B-32K and GLM-4-9B multiply the base; nothing
    but the vocabulary tells GLM-4, so the others need a key of ours."""
    ratio = config.get("rope_ratio", 1)
    scales = config.get("rope_ratio_scales", "base" if ratio == 1 or config["padded_vocab_size"] > 65024 else None)
    if scales == "base":
        return RopeConfig(head_dim // 2, 10000.0 * ratio, "interleaved")
    if scales == "positions":
        return RopeConfig(head_dim // 2, 10000.0, "interleaved", scaling=LinearScaling(ratio))
    raise UserError(
        f"rope_ratio={ratio} of config.json has two meanings: add rope_ratio_scales (it is {scales!r}), `positions` "
        "for ChatGLM2-6B-32K or `base` for ChatGLM3-6B-32K"
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    layer = config.layers[0]
    attention, rope = layer.self_attn, layer.self_attn.rope
    assert isinstance(layer.mlp, MlpConfig)
    assert rope is not None
    linear = rope.scaling if isinstance(rope.scaling, LinearScaling) else None
    ratio: dict[str, Any] = {"rope_ratio": linear.factor if linear else rope.theta / 10000.0}
    ratio = {} if ratio["rope_ratio"] == 1 else ratio | {"rope_ratio_scales": "positions" if linear else "base"}
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "padded_vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": layer.mlp.intermediate_size,
        "kv_channels": attention.head_dim,
        "num_attention_heads": attention.num_heads,
        "multi_query_attention": attention.num_kv_heads != attention.num_heads,
        "multi_query_group_num": attention.num_kv_heads,
        "num_layers": config.num_layers,
        "add_bias_linear": attention.o_proj.bias,
        "add_qkv_bias": attention.q_proj.bias,
        "layernorm_epsilon": layer.input_layernorm.eps,
        "rmsnorm": layer.input_layernorm.kind == "rms",
        "apply_residual_connection_post_layernorm": layer.residual.kind == "scaled",
        "post_layer_norm": config.norm is not None,
        "original_rope": True,
        "seq_length": config.max_position_embeddings,
        "tie_word_embeddings": config.lm_head.tied,
        **ratio,
        **reading.spell_token_ids(config),
    }


def constants(config: ModelConfig) -> dict[str, Callable[[], Tensor]]:
    rope = config.layers[0].self_attn.rope
    return {"transformer.rotary_pos_emb.inv_freq": partial(inverse_frequencies, rope)} if rope else {}


CHATGLM2 = Family("chatglm2", from_hf, to_hf, ROWS, constants=constants)
