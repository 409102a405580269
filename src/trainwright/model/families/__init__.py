"""Which family a config.json belongs to. One explicit table, nothing registers itself; no torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

from trainwright.errors import UserError
from trainwright.model.families.family import Family

_WHERE = {
    "baichuan_7b": ("baichuan", "BAICHUAN_7B"),
    "baichuan_13b": ("baichuan", "BAICHUAN_13B"),
    "baichuan2_7b": ("baichuan", "BAICHUAN2_7B"),
    "baichuan2_13b": ("baichuan", "BAICHUAN2_13B"),
    "bloom": ("bloom", "BLOOM"),
    "chatglm": ("chatglm", "CHATGLM"),
    "chatglm2": ("chatglm2", "CHATGLM2"),
    "glm_130b": ("glm_130b", "GLM_130B"),
    "gpt2": ("gpt2", "GPT2"),
    "llama": ("llama", "LLAMA"),
    "mistral": ("mistral", "MISTRAL"),
    "mixtral": ("mixtral", "MIXTRAL"),
    "opt": ("opt", "OPT"),
    "qwen": ("qwen", "QWEN"),
    "qwen2": ("qwen2", "QWEN2"),
    "qwen3": ("qwen3", "QWEN3"),
    "qwen3_moe": ("qwen3_moe", "QWEN3_MOE"),
}
"""Family -> its file and its name there."""

_ALIKE = ("bloom", "gpt2", "llama", "mistral", "mixtral", "opt", "qwen", "qwen2", "qwen3", "qwen3_moe")
_MODEL_TYPES = {"glm-130b": "glm_130b"} | {name: name for name in _ALIKE}
"""model_type of config.json -> family, where that says it."""


def _tell_baichuan(config: Mapping[str, Any]) -> str:
    from trainwright.model.families.baichuan import tell

    return tell(config)


_SHARED_TYPES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "baichuan": _tell_baichuan,
    "chatglm": lambda config: "chatglm2" if "padded_vocab_size" in config else "chatglm",
}
"""model_type that several families share -> what tells them apart."""


def names() -> list[str]:
    return sorted(_WHERE)


@cache
def get(name: str) -> Family:
    """The family of this name; a UserError names the nearest one."""
    if name not in _WHERE:
        near = difflib.get_close_matches(name, _WHERE, 1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UserError(f"model.family={name} is not one of {', '.join(names())}{hint}")
    file, attribute = _WHERE[name]
    return getattr(import_module(f"{__name__}.{file}"), attribute)


def detect(config: Mapping[str, Any]) -> str:
    """The family's name from the keys of config.json."""
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"model_type {kind!r} of config.json is not a name: say the family with model.family=NAME")
    if kind in _MODEL_TYPES:
        return _MODEL_TYPES[kind]
    if kind in _SHARED_TYPES:
        return _SHARED_TYPES[kind](config)
    if kind is None:
        raise UserError("config.json has no model_type: say the family with model.family=NAME")
    near = difflib.get_close_matches(str(kind), [*_MODEL_TYPES, *_SHARED_TYPES], 1)
    hint = f" (the nearest is {near[0]})" if near else ""
    known = ", ".join(names())
    raise UserError(f"model_type {kind!r} is not known{hint}: if its shape is one of {known}, say model.family=NAME")
