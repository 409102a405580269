"""Reads and writes the parts of config.json that many families spell alike: rotary scaling, activations, token ids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainwright.errors import UserError
from trainwright.model.config import (
    Activation,
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_SPELLED: dict[Activation, str] = {"silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}


class Keys(dict[str, Any]):
    """config.json's keys; one that is null is one that is not there, unless `in` is asked."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if value is None:
            raise KeyError(key)
        return value

    def get(self, key: str, default: Any = None) -> Any:
        value = super().get(key)
        return default if value is None else value


def need(config: Mapping[str, Any], *names: str) -> Any:
    """The first of these keys that config.json has."""
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise UserError(f"config.json has no `{names[0]}`: take the config.json that was published with the weights")


def refuse(config: Mapping[str, Any], **only: Any) -> None:
    """Options of the published code that change the arithmetic and that no published weights use."""
    for key, value in only.items():
        if config.get(key) is not None and config.get(key) != value:
            raise UserError(f"{key}={config[key]!r} of config.json is not supported: only {value!r} is")


def activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise UserError(f"activation {name!r} of config.json is not one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def spell_activation(name: Activation) -> str:
    return _SPELLED[name]


def token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """bos, eos (one or several) and pad as ModelConfig's keywords."""
    eos = config.get("eos_token_id")
    ends = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    bos, pad = config.get("bos_token_id"), config.get("pad_token_id")
    return {"bos_token_id": bos, "eos_token_ids": ends, "pad_token_id": pad}


def padding_idx(config: Mapping[str, Any]) -> int | None:
    """The pad token's row, which the lookup gives no gradient; LLaMA 1's -1 means that there is none."""
    pad, vocab = config.get("pad_token_id"), config["vocab_size"]
    if pad is not None and pad >= vocab:
        raise UserError(
            f"pad_token_id={pad} of config.json is beyond vocab_size={vocab}: name a token that the table has, or null"
        )
    return pad if pad is not None and pad >= 0 else None


def spell_token_ids(config: ModelConfig) -> dict[str, Any]:
    ends = config.eos_token_ids
    eos = None if not ends else ends[0] if len(ends) == 1 else list(ends)
    found = {"bos_token_id": config.bos_token_id, "eos_token_id": eos, "pad_token_id": config.pad_token_id}
    return {key: value for key, value in found.items() if value is not None}


def rope(config: Mapping[str, Any], head_dim: int, theta: float = 10000.0) -> RopeConfig:
    """`rope_theta` and `rope_scaling`, or `rope_parameters` that holds both since transformers 5. theta: the family's
    where config.json has none."""
    scaling = _rope_keys(config)
    theta = config.get("rope_theta") or scaling.get("rope_theta") or theta
    part = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return RopeConfig(int(head_dim * part), float(theta), scaling=_scaling(scaling, config))


def _rope_keys(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of rotary scaling; refused where it says two things, of which a reader sees one."""
    old, new = (dict(config.get(key) or {}) for key in ("rope_scaling", "rope_parameters"))
    for key in old.keys() & new.keys():
        if old[key] != new[key]:
            raise UserError(f"rope_scaling and rope_parameters of config.json differ in {key}: keep one of the two")
    found = Keys(new | old)
    theta = config.get("rope_theta")
    if theta and found.get("rope_theta", theta) != theta:
        raise UserError(
            f"rope_theta={theta} of config.json is not the {found['rope_theta']} of its rope_parameters: "
            "change both, or keep one"
        )
    return found


_ROPE_KEYS: dict[str, str] = {
    "default": "",
    "linear": "factor",
    "dynamic": "factor",
    "llama3": "factor low_freq_factor high_freq_factor original_max_position_embeddings",
    "yarn": "factor original_max_position_embeddings attention_factor mscale mscale_all_dim beta_fast beta_slow "
    "truncate finetuned",
}
"""rope_type -> its keys. `finetuned` tells training code where weights came from, nothing else."""


def _scaling(given: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling | None:
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in _ROPE_KEYS:
        raise UserError(f"rope_scaling type {kind!r} of config.json is not one of {', '.join(list(_ROPE_KEYS)[1:])}")
    known = ["type", "rope_type", "rope_theta", "partial_rotary_factor", *_ROPE_KEYS[kind].split()]
    odd = sorted(key for key, value in given.items() if key not in known and value is not None)
    if odd:
        raise UserError(f"{odd[0]}={given[odd[0]]!r} in rope_scaling of config.json means nothing to type {kind!r}")
    match kind:
        case "linear":
            return LinearScaling(float(given["factor"]))
        case "dynamic":
            return DynamicNtkScaling(float(given["factor"]), int(need(config, "max_position_embeddings")))
        case "llama3":
            ends = (float(given["low_freq_factor"]), float(given["high_freq_factor"]))
            return Llama3Scaling(float(given["factor"]), *ends, int(given["original_max_position_embeddings"]))
        case "yarn":
            trained = int(given.get("original_max_position_embeddings") or need(config, "max_position_embeddings"))
            factor = float(given.get("factor") or config["max_position_embeddings"] / trained)
            return YarnScaling(
                factor,
                trained,
                _yarn_attention(factor, given),
                float(given.get("beta_fast") or 32),
                float(given.get("beta_slow") or 1),
                bool(given.get("truncate", True)),
            )
    return None


def _yarn_attention(factor: float, given: Mapping[str, Any]) -> float:
    """YaRN, equation 22: 0.1 ln(factor) + 1, with DeepSeek's two weights of it where given."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])

    def grow(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return grow(given["mscale"]) / grow(given["mscale_all_dim"])
    return grow(1.0)


def spell_rope(rope: RopeConfig, head_dim: int) -> dict[str, Any]:
    """The same in config.json's keys."""
    spelled: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.rotary_dim != head_dim:
        spelled["partial_rotary_factor"] = rope.rotary_dim / head_dim
    match rope.scaling:
        case LinearScaling(factor):
            spelled["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        case DynamicNtkScaling(factor):
            spelled["rope_scaling"] = {"rope_type": "dynamic", "factor": factor}
        case Llama3Scaling() | YarnScaling() as scaling:
            kind = "llama3" if isinstance(scaling, Llama3Scaling) else "yarn"
            spelled["rope_scaling"] = {"rope_type": kind, **vars(scaling)}
    return spelled
