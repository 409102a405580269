"""Baichuan 7B (rotary) and 13B (ALiBi), first generation and second (normalised head); four families of one shape.

config.json says neither ALiBi nor the normalised head: `tell` reads them from sizes and from which keys are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from trainwright.errors import UserError
from trainwright.model.config import ModelConfig
from trainwright.model.families import llama, reading
from trainwright.model.families.family import Family, Row

_ATTENTION = "layers.{n}.self_attn."
ROWS = (
    *llama.OUTER,
    Row("model.layers.{n}.input_layernorm", "layers.{n}.input_layernorm"),
    Row(
        "model.layers.{n}.self_attn.W_pack",
        (_ATTENTION + "q_proj", _ATTENTION + "k_proj", _ATTENTION + "v_proj"),
        "blocks",
    ),
    Row("model.layers.{n}.self_attn.o_proj", _ATTENTION + "o_proj"),
    Row("model.layers.{n}.post_attention_layernorm", "layers.{n}.post_attention_layernorm"),
    *llama.MLP,
)


def tell(config: Mapping[str, Any]) -> str:
    """The family's name. 7B is 4096 wide and has max_position_embeddings, 13B is 5120 wide and has not; the second
    generation has 125696 tokens and z_loss_weight, the first 64000."""
    alibi = {4096: False, 5120: True}.get(config["hidden_size"], "max_position_embeddings" not in config)
    size = "13b" if alibi else "7b"
    second = {64000: False, 125696: True}.get(config["vocab_size"], True if "z_loss_weight" in config else None)
    if second is None:
        raise UserError(
            f"vocab_size {config['vocab_size']} of config.json is neither Baichuan's 64000 nor Baichuan 2's 125696: "
            f"say model.family=baichuan_{size} or model.family=baichuan2_{size}"
        )
    return f"baichuan{'2' if second else ''}_{size}"


def _from_hf(config: Mapping[str, Any], *, name: str, alibi: bool, normalized: bool) -> ModelConfig:
    reading.refuse(config, z_loss_weight=0)
    layer = llama.block(config)
    attention = replace(layer.self_attn, rope=None, alibi=True) if alibi else layer.self_attn
    layer = replace(layer, self_attn=attention)
    model = llama.decoder(name, config, (layer,) * config["num_hidden_layers"])
    length = config.get("max_position_embeddings") or config.get("model_max_length") or 4096
    head = replace(model.lm_head, normalized=normalized)
    return replace(model, lm_head=head, max_position_embeddings=length)


def _to_hf(config: ModelConfig, *, architecture: str, alibi: bool, normalized: bool) -> dict[str, Any]:
    spelled = llama.spell_decoder(config, "baichuan", architecture)
    for key in ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling"):
        spelled.pop(key, None)
    if alibi:
        spelled["model_max_length"] = spelled.pop("max_position_embeddings")
    if normalized:
        spelled["z_loss_weight"] = 0
    return spelled


def _family(name: str, architecture: str, *, alibi: bool, normalized: bool) -> Family:
    return Family(
        name,
        partial(_from_hf, name=name, alibi=alibi, normalized=normalized),
        partial(_to_hf, architecture=architecture, alibi=alibi, normalized=normalized),
        ROWS,
        ignored=llama.IGNORED,
    )


BAICHUAN_7B = _family("baichuan_7b", "BaiChuanForCausalLM", alibi=False, normalized=False)
BAICHUAN_13B = _family("baichuan_13b", "BaichuanForCausalLM", alibi=True, normalized=False)
BAICHUAN2_7B = _family("baichuan2_7b", "BaichuanForCausalLM", alibi=False, normalized=True)
BAICHUAN2_13B = _family("baichuan2_13b", "BaichuanForCausalLM", alibi=True, normalized=True)
