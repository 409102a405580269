"""Which family a config.json belongs to. One explicit table, nothing registers itself; no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

from trainwright.errors import UserError
from trainwright.model.families.family import Family

_WHERE = {
    "llama": ("llama", "LLAMA"),
}
"""Family -> its file and its name there."""

_MODEL_TYPES = {
    "llama": "llama",
}
"""model_type of config.json -> family, where that says it."""


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
    if kind in _MODEL_TYPES:
        return _MODEL_TYPES[kind]
    if kind is None:
        raise UserError("config.json has no model_type: say the family with model.family=NAME")
    near = difflib.get_close_matches(str(kind), _MODEL_TYPES, 1)
    hint = f" (the nearest is {near[0]})" if near else ""
    known = ", ".join(names())
    raise UserError(f"model_type {kind!r} is not known{hint}: if its shape is one of {known}, say model.family=NAME")
