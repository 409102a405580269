"""Where a model's tree comes from: keys, a config.json, a folder, a hub id or a name. No torch, so the planner uses it.

Owns the order of these; reading keys is the family's work, folders are folder.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainwright.errors import UserError
from trainwright.model import families, folder, named
from trainwright.model.config import ModelConfig


def load_config(
    source: str | Path | Mapping[str, Any], family: str | None = None, overrides: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The tree of a model: from a dict of config.json's keys, a config.json, a folder, a hub id or a named model.

    `overrides` change keys of config.json before it is read. UserError names the file, the value and the fix.
    """
    told, given = _find(source)
    keys = _Keys({**given, **(overrides or {})})
    found = families.get(family or told or families.detect(keys))
    try:
        return found.from_hf(keys)
    except KeyError as error:
        raise UserError(f"config.json has no {error}, which the family {found.name} needs") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"config.json cannot be read as one of the family {found.name}: {error}") from error


class _Keys(dict[str, Any]):
    """A key that is null is a key that is not there."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if value is None:
            raise KeyError(key)
        return value


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
    if config.source.get("architectures") and family.from_hf(config.source) == config:
        return dict(config.source)
    return {**config.source, **family.to_hf(config)}
