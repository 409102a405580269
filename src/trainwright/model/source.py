"""Where a model's tree comes from: keys, a config.json, a folder, a hub id or a name. No torch, so the planner uses it.

Owns the order of these; reading keys is the family's work, folders are folder.py's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from trainwright.errors import UserError
from trainwright.model import families, folder, named
from trainwright.model.config import ModelConfig
from trainwright.model.families.reading import Keys, refuse
from trainwright.model.shapes import parameter_shapes


def load_config(
    source: str | Path | Mapping[str, Any], family: str | None = None, overrides: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The tree of a model: from a dict of config.json's keys, a config.json, a folder, a hub id or a named model.

    `overrides` change keys of config.json before it is read. UserError names the file, the value and the fix.
    """
    told, given = _find(source)
    keys = Keys({**given, **(overrides or {})})
    if keys.get("quantization_config"):
        raise UserError(
            "quantization_config of config.json: weights in fewer bits are not read; take the unquantized ones and say "
            "`quantize` in the recipe, or set quantization_config to null for random weights"
        )
    refuse(keys, is_encoder_decoder=False)
    name = family or told or _whose(keys)
    try:
        config = families.get(name).from_hf(keys)
        _check_kinds(config)
        _check_sizes(config)
    except KeyError as error:
        raise UserError(f"config.json has no {error}, which the family {name} needs") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError, MemoryError) as error:
        raise UserError(f"config.json cannot be read as one of the family {name}: {error}") from error
    return config


def _whose(keys: Keys) -> str:
    try:
        return families.detect(keys)
    except KeyError as error:
        raise UserError(f"config.json has no {error}, which tells the family: say model.family=NAME") from error


def _check_kinds(node: object) -> None:
    """Raises ValueError for a number that is none, or not a whole one: JSON says anything. Flags are only asked."""
    for name, kinds in _fields(type(node)).items():  # type: ignore[arg-type]
        value = getattr(node, name)
        if dataclasses.is_dataclass(value):
            _check_kinds(value)
        elif isinstance(value, tuple):
            for child in {id(child): child for child in value if dataclasses.is_dataclass(child)}.values():
                _check_kinds(child)
        elif (value is None and type(None) in kinds) or bool in kinds:
            continue
        elif int in kinds and type(value) is not int:
            raise ValueError(f"{name} is {value!r}, not a whole number")
        elif float in kinds and (type(value) not in (int, float) or not math.isfinite(value)):
            raise ValueError(f"{name} is {value!r}, not a number")


@cache
def _fields(part: type) -> dict[str, tuple[Any, ...]]:
    """Each field of a part of the tree and the types that it may have."""
    hints = get_type_hints(part)
    return {item.name: get_args(hints[item.name]) or (hints[item.name],) for item in dataclasses.fields(part)}


def _check_sizes(config: ModelConfig) -> None:
    """Raises ValueError for sizes that no tensor can have, and for a model of no layers or no positions."""
    for name, shape in parameter_shapes(config).items():
        if min(shape) < 1:
            raise ValueError(f"{name} would be {list(shape)}, sizes are above 0")
    if not config.layers or config.max_position_embeddings < 1:
        raise ValueError(f"it has {config.num_layers} layers and {config.max_position_embeddings} positions")


def _find(source: str | Path | Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """(the family if the source says it, the keys)."""
    if isinstance(source, Mapping):
        return None, source
    text, path = str(source), Path(source).expanduser()
    if path.is_file():
        return None, folder.read_json(path)
    if path.is_dir() or text.startswith(("hf:", "modelscope:")):
        return None, folder.read_json(folder.resolve(source) / "config.json")
    model = named.find(text)
    if model is None:
        raise named.unknown(text)
    return model.family, model.keys


def spelled_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of this model: word for word what it came from where that still says the same."""
    family = families.get(config.family)
    if config.source.get("architectures") and family.from_hf(Keys(config.source)) == config:
        return dict(config.source)
    spelled = family.to_hf(config)
    kept = {
        key: value for key, value in config.source.items() if key != "rope_parameters" or "rope_theta" not in spelled
    }
    return {**kept, **spelled}
